//! gRPC by tonic, which the targets and the client speak: messages, trailers, health.

use std::{collections::BTreeSet, convert::Infallible, pin::Pin, task};

use futures::{StreamExt, stream};
use lb_tests::{clients, servers::Server, topology::Topology};
use tokio::{net::TcpStream, runtime};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    codegen::http,
    metadata::MetadataMap,
    server::NamedService,
    transport::{Certificate, Channel, ClientTlsConfig},
};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

use crate::world::{World, application, group, sockets};

const PORT: u16 = 50051;

#[derive(Clone, PartialEq, prost::Message)]
struct Text {
    #[prost(string, tag = "1")]
    text: String,
    #[prost(uint32, tag = "2")]
    number: u32,
}

impl Text {
    fn new(text: &str, number: u32) -> Self {
        Self { text: text.to_owned(), number }
    }
}

/// A target's service; says its name.
#[derive(Clone)]
struct Greeter(String);

impl NamedService for Greeter {
    const NAME: &'static str = "lb.Greeter";
}

impl Greeter {
    fn greet(&self, Text { text, number }: Text) -> Text {
        Text { text: format!("hello {text} from {}", self.0), number }
    }

    /// A greeting, or for an empty name an error with a field of its own.
    async fn say(self, request: Request<Text>) -> Result<Response<Text>, Status> {
        let text = request.into_inner();
        if text.text.is_empty() {
            let mut details = MetadataMap::new();
            details.insert("x-detail", "no name".parse().unwrap());
            return Err(Status::with_metadata(Code::InvalidArgument, "who?", details));
        }
        Ok(Response::new(self.greet(text)))
    }

    /// A greeting for each name, as they come; at the end an error, in the trailers.
    async fn chat(
        self,
        request: Request<Streaming<Text>>,
    ) -> Result<Response<stream::BoxStream<'static, Result<Text, Status>>>, Status> {
        let forwarded = request.metadata().get("x-forwarded-for").cloned();
        let greetings = request.into_inner().map(move |text| Ok(self.greet(text?)));
        let end = stream::iter([Err(Status::data_loss("the end"))]);
        let mut response = Response::new(greetings.chain(end).boxed());
        if let Some(forwarded) = forwarded {
            response.metadata_mut().insert("x-seen", forwarded);
        }
        Ok(response)
    }
}

impl Service<http::Request<Body>> for Greeter {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<Result<(), Infallible>> {
        task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::default());
            Ok(match request.uri().path() {
                "/lb.Greeter/Say" => {
                    grpc.unary(service_fn(|it| this.clone().say(it)), request).await
                }
                "/lb.Greeter/Chat" => {
                    grpc.streaming(service_fn(|it| this.clone().chat(it)), request).await
                }
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}

/// Serves one connection, with gRPC's own health service.
async fn serve(name: String, stream: TcpStream) {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<Greeter>().await;
    let mut server = tonic::transport::Server::builder();
    let router = server.add_service(Greeter(name)).add_service(health);
    // It has taken the connection when this returns, and serves it until the runtime ends.
    let incoming = stream::iter([Ok::<_, std::io::Error>(stream)]);
    router.serve_with_incoming(incoming).await.unwrap();
}

fn greeters(topology: &Topology) -> Vec<Server> {
    let start = |(target, address): (&lb_tests::netns::Namespace, _)| {
        let name = target.role().to_owned();
        Server::connections(target, address, move |stream| serve(name.clone(), stream)).unwrap()
    };
    sockets(topology, PORT).into_iter().map(start).collect()
}

fn start(check: &str) -> World<Vec<Server>> {
    World::start(greeters, |authority| {
        let lines = "protocol = \"http\"\nprotocol_version = \"grpc\"";
        let certificate = authority.issue("site.test");
        let listener = format!(
            "[[load_balancer.site.listener]]\nprotocol = \"https\"\ntarget_group = \"rpc\"\n\
             certificates = [{certificate}]\n"
        );
        group("rpc", PORT, &[0, 1], lines, check) + &application("", &listener)
    })
}

type Client = tonic::client::Grpc<Channel>;

/// Does what `f` says as the client, over one connection.
fn with_client<S: Sync>(world: &World<S>, address: usize, f: impl AsyncFnOnce(Client) + Send) {
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(world.authority.pem()))
        .domain_name("site.test");
    let uri = format!("https://{}", world.at(443)[address]);
    let talk = async || {
        let endpoint = Channel::from_shared(uri).unwrap().tls_config(tls).unwrap();
        let mut client = Client::new(endpoint.connect().await.unwrap());
        client.ready().await.unwrap();
        f(client).await;
    };
    world.topology.client.run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime
            .block_on(async { tokio::time::timeout(clients::TIMEOUT * 20, talk()).await.unwrap() });
    });
}

async fn say(client: &mut Client, text: Text) -> Result<Text, Status> {
    client.ready().await.unwrap();
    let path = "/lb.Greeter/Say".parse().unwrap();
    let response = client.unary(Request::new(text), path, ProstCodec::<Text, Text>::default());
    Ok(response.await?.into_inner())
}

#[test]
fn unary_calls_and_their_errors() {
    let world = start("");
    for address in 0..2 {
        with_client(&world, address, async |mut client: Client| {
            let mut names = BTreeSet::new();
            for number in 0..8 {
                let answer = say(&mut client, Text::new("world", number)).await.unwrap();
                assert_eq!(answer.number, number);
                names.insert(answer.text);
            }
            let both = ["hello world from target0", "hello world from target1"];
            assert!(names.iter().eq(both), "one connection, both targets: {names:?}");
            let error = say(&mut client, Text::default()).await.unwrap_err();
            assert_eq!((error.code(), error.message()), (Code::InvalidArgument, "who?"));
            assert_eq!(error.metadata().get("x-detail").unwrap(), "no name");
            let large = "x".repeat(1_000_000);
            let answer = say(&mut client, Text::new(&large, 1)).await.unwrap();
            assert!(answer.text.contains(&large));
        });
    }
    assert_eq!(world.metric("GrpcRequestCount"), 20);
}

#[test]
fn streaming_calls_both_ways_with_trailers() {
    let world = start("");
    for (address, own) in lb_tests::topology::client_host().both().into_iter().enumerate() {
        with_client(&world, address, async |mut client: Client| {
            let (sender, receiver) = futures::channel::mpsc::unbounded();
            let path = "/lb.Greeter/Chat".parse().unwrap();
            let request = Request::new(receiver);
            let response = client.streaming(request, path, ProstCodec::<Text, Text>::default());
            let response = response.await.unwrap();
            assert_eq!(response.metadata().get("x-seen").unwrap(), &own.to_string());
            let mut answers = response.into_inner();
            // Each is answered before the next one is sent.
            for number in 0..10 {
                sender.unbounded_send(Text::new("you", number)).unwrap();
                let answer: Text = answers.message().await.unwrap().unwrap();
                assert!(answer.text.starts_with("hello you from target"), "{answer:?}");
                assert_eq!(answer.number, number);
            }
            drop(sender);
            let error = answers.message().await.unwrap_err();
            assert_eq!((error.code(), error.message()), (Code::DataLoss, "the end"));
        });
    }
}

/// By gRPC's own health service; and a status that does not pass.
#[test]
fn health_checks_of_grpc() {
    let world = start(", path = \"/grpc.health.v1.Health/Check\", matcher = \"0\"");
    let check = |path: &str, matcher: &str| {
        let lines = "protocol = \"http\"\nprotocol_version = \"grpc\"";
        let check = format!(", path = \"{path}\", matcher = \"{matcher}\"");
        let listener =
            "[[load_balancer.site.listener]]\nprotocol = \"http\"\ntarget_group = \"rpc\"\n";
        group("rpc", PORT, &[0, 1], lines, &check) + &application("", listener)
    };
    let wait = |state: &str| {
        for index in 0..2 {
            for address in lb_tests::topology::target_host(index).both() {
                world.agent.wait_for_target(&address.to_string(), state).unwrap();
            }
        }
    };
    wait("healthy");
    world.reload(&check("/grpc.health.v1.Health/None", "0"));
    wait("unhealthy");
    let targets = world.agent.targets().unwrap().to_string();
    assert!(targets.contains("Target.ResponseCodeMismatch"), "{targets}");
    world.reload(&check("/grpc.health.v1.Health/None", "12"));
    wait("healthy");
}
