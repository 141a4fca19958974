//! Real servers inside a namespace, each on a thread of its own, killed on drop.

use std::{
    convert::Infallible,
    net::{Shutdown, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
};

use anyhow::Result;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::{ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    runtime,
    sync::watch,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use crate::{netns::Namespace, transfers};

/// A running server. To restart it, drop it and make another at the same address.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    served: Arc<AtomicU64>,
    /// Dropped to stop the thread.
    running: Option<watch::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Sends back what it receives, connection by connection.
    ///
    /// # Errors
    ///
    /// If the address is taken or not the namespace's.
    pub fn tcp_echo(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::start(namespace, address, async |socket: TcpListener, served, stopped| {
            accept(&socket, stopped, served, echo).await;
        })
    }

    /// Sends every datagram back.
    ///
    /// # Errors
    ///
    /// If the address is taken or not the namespace's.
    pub fn udp_echo(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        Self::start(namespace, address, async |socket: UdpSocket, served, mut stopped| {
            tokio::select! {
                () = echo_datagrams(&socket, &served) => {}
                _ = stopped.changed() => {}
            }
        })
    }

    /// The server of [`Transfers`](crate::transfers::Transfers), which says `number` first.
    ///
    /// # Errors
    ///
    /// If the address is taken or not the namespace's.
    pub fn transfers(namespace: &Namespace, address: SocketAddr, number: u8) -> Result<Self> {
        let serve = move |mut stream: TcpStream, mut stopped: watch::Receiver<()>| async move {
            tokio::select! {
                // What fails is seen by the client too, who tells.
                _ = transfers::serve(&mut stream, number) => {}
                _ = stopped.changed() => reset(&stream),
            }
        };
        Self::start(namespace, address, async move |socket: TcpListener, served, stopped| {
            accept(&socket, stopped, served, serve).await;
        })
    }

    /// Serves each TCP connection with `serve`, until that ends or the server is dropped.
    ///
    /// # Errors
    ///
    /// If the address is taken or not the namespace's.
    pub fn connections<F: Future<Output = ()> + Send + 'static>(
        namespace: &Namespace,
        address: SocketAddr,
        serve: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> Result<Self> {
        Self::start(namespace, address, async move |socket: TcpListener, served, stopped| {
            let serve = |stream, mut stopped: watch::Receiver<()>| {
                let serving = serve(stream);
                async move {
                    tokio::select! {
                        () = serving => {}
                        _ = stopped.changed() => {}
                    }
                }
            };
            accept(&socket, stopped, served, serve).await;
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections, HTTP requests or datagrams it took so far.
    pub fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    fn start<S: Bind>(
        namespace: &Namespace,
        address: SocketAddr,
        serve: impl AsyncFnOnce(S, Arc<AtomicU64>, watch::Receiver<()>) + Send + 'static,
    ) -> Result<Self> {
        let served = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&served);
        let (running, stopped) = watch::channel(());
        namespace.run(|| {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let socket = runtime.block_on(S::bind(address))?;
            let address = socket.address()?;
            let thread = thread::spawn(move || runtime.block_on(serve(socket, count, stopped)));
            Ok(Self { address, served, running: Some(running), thread: Some(thread) })
        })
    }
}

impl Drop for Server {
    /// As when a process is killed: the port is closed and connections are reset.
    fn drop(&mut self) {
        self.running.take();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed; another one here would abort.
            let _ = thread.join();
        }
    }
}

/// A web server:
///
/// | request | answer |
/// |---|---|
/// | GET /bytes/N | N bytes, see [`body`] |
/// | GET /client | the client's address and port |
/// | GET /headers | the request's header, a field a line |
/// | GET /health | 200, or 503 after [`HttpServer::set_healthy`] |
/// | GET anything else | "hello world from NAME" |
/// | POST | the request's body |
#[derive(Debug)]
pub struct HttpServer {
    server: Server,
    healthy: Arc<AtomicBool>,
}

impl HttpServer {
    /// Starts it, named after the namespace's role.
    ///
    /// # Errors
    ///
    /// If the address is taken or not the namespace's.
    pub fn start(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let healthy = Arc::new(AtomicBool::new(true));
        let site = Site { name: namespace.role().to_owned(), healthy: Arc::clone(&healthy) };
        let site = Arc::new(site);
        let serve = async move |socket: TcpListener, served: Arc<AtomicU64>, stopped| {
            let connections = Arc::new(AtomicU64::new(0));
            accept(&socket, stopped, connections, |stream, stopped| {
                serve_http(stream, stopped, Arc::clone(&site), Arc::clone(&served))
            })
            .await;
        };
        Ok(Self { server: Server::start(namespace, address, serve)?, healthy })
    }

    /// The same over TLS, with a self-signed certificate.
    ///
    /// # Errors
    ///
    /// If the address is taken or not the namespace's.
    pub fn start_tls(namespace: &Namespace, address: SocketAddr) -> Result<Self> {
        let acceptor = self_signed()?;
        let healthy = Arc::new(AtomicBool::new(true));
        let site = Site { name: namespace.role().to_owned(), healthy: Arc::clone(&healthy) };
        let site = Arc::new(site);
        let serve = async move |socket: TcpListener, served: Arc<AtomicU64>, stopped| {
            let connections = Arc::new(AtomicU64::new(0));
            accept(&socket, stopped, connections, |stream, stopped| {
                serve_https(
                    acceptor.clone(),
                    stream,
                    stopped,
                    Arc::clone(&site),
                    Arc::clone(&served),
                )
            })
            .await;
        };
        Ok(Self { server: Server::start(namespace, address, serve)?, healthy })
    }

    /// What `/health` answers from now on.
    pub fn set_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Relaxed);
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// How many requests it took so far, health checks included.
    pub fn served(&self) -> u64 {
        self.server.served()
    }
}

/// The first `length` bytes of a sequence that repeats after 251, a prime, so that a lost or
/// doubled segment shows.
pub fn body(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

trait Bind: Sized + Send + 'static {
    async fn bind(address: SocketAddr) -> std::io::Result<Self>;
    fn address(&self) -> std::io::Result<SocketAddr>;
}

impl Bind for TcpListener {
    async fn bind(address: SocketAddr) -> std::io::Result<Self> {
        Self::bind(address).await
    }

    fn address(&self) -> std::io::Result<SocketAddr> {
        self.local_addr()
    }
}

impl Bind for UdpSocket {
    async fn bind(address: SocketAddr) -> std::io::Result<Self> {
        Self::bind(address).await
    }

    fn address(&self) -> std::io::Result<SocketAddr> {
        self.local_addr()
    }
}

/// Serves every connection in a task of its own until told to stop, then waits for the tasks.
async fn accept<F: Future<Output = ()> + Send + 'static>(
    listener: &TcpListener,
    mut stopped: watch::Receiver<()>,
    accepted: Arc<AtomicU64>,
    serve: impl Fn(TcpStream, watch::Receiver<()>) -> F,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Ok((stream, _)) = listener.accept() => {
                accepted.fetch_add(1, Relaxed);
                connections.spawn(serve(stream, stopped.clone()));
            }
            Some(_) = connections.join_next() => {}
            _ = stopped.changed() => break,
        }
    }
    // Closing would not do: a command that another thread starts holds a copy of the descriptor
    // between its fork and its exec, and the port would stay open for as long.
    let _ = SockRef::from(listener).shutdown(Shutdown::Both);
    while connections.join_next().await.is_some() {}
}

/// Echoes until the client ends or fails; being stopped resets the connection.
async fn echo(mut stream: TcpStream, mut stopped: watch::Receiver<()>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = tokio::select! {
            result = stream.read(&mut buffer) => result.unwrap_or(0),
            _ = stopped.changed() => {
                reset(&stream);
                return;
            }
        };
        if length == 0 || stream.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// Makes the closing of `stream` a reset.
fn reset(stream: &TcpStream) {
    // It fails only if the connection is gone.
    let _ = stream.set_zero_linger();
}

async fn echo_datagrams(socket: &UdpSocket, served: &AtomicU64) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        // An error is an ICMP message about an earlier datagram.
        if let Ok((length, client)) = socket.recv_from(&mut buffer).await {
            served.fetch_add(1, Relaxed);
            let _ = socket.send_to(&buffer[..length], client).await;
        }
    }
}

/// What the pages of a web server depend on.
#[derive(Debug)]
struct Site {
    name: String,
    healthy: Arc<AtomicBool>,
}

async fn serve_http(
    stream: TcpStream,
    mut stopped: watch::Receiver<()>,
    site: Arc<Site>,
    served: Arc<AtomicU64>,
) {
    let Ok(client) = stream.peer_addr() else { return };
    let service = service_fn(|request| {
        served.fetch_add(1, Relaxed);
        answer(&site, client, request)
    });
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // The client may end as it likes.
        _ = &mut connection => {}
        _ = stopped.changed() => reset(connection.into_parts().io.inner()),
    }
}

async fn serve_https(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    mut stopped: watch::Receiver<()>,
    site: Arc<Site>,
    served: Arc<AtomicU64>,
) {
    let Ok(client) = stream.peer_addr() else { return };
    // A client that does not speak TLS may try.
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let service = service_fn(|request| {
        served.fetch_add(1, Relaxed);
        answer(&site, client, request)
    });
    tokio::select! {
        _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service) => {}
        _ = stopped.changed() => {}
    }
}

fn self_signed() -> Result<TlsAcceptor> {
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(["target.invalid".to_owned()])?.self_signed(&key)?;
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    Ok(Arc::new(config).into())
}

async fn answer(
    site: &Site,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut status = StatusCode::OK;
    let path = request.uri().path();
    let content = if request.method() == Method::POST {
        match request.into_body().collect().await {
            Ok(content) => content.to_bytes(),
            Err(_) => {
                status = StatusCode::BAD_REQUEST;
                Bytes::new()
            }
        }
    } else if let Some(length) = path.strip_prefix("/bytes/").and_then(|n| n.parse().ok()) {
        body(length).into()
    } else if path == "/client" {
        client.to_string().into()
    } else if path == "/headers" {
        let fields = request.headers().iter();
        let lines =
            fields.map(|(name, value)| format!("{name}: {}\n", value.as_bytes().escape_ascii()));
        lines.collect::<String>().into()
    } else if path == "/health" && !site.healthy.load(Relaxed) {
        status = StatusCode::SERVICE_UNAVAILABLE;
        "unhealthy".into()
    } else {
        format!("hello world from {}", site.name).into()
    };
    let mut response = Response::new(Full::new(content));
    *response.status_mut() = status;
    Ok(response)
}
