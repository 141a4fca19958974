//! The server and the client, together over a real socket; the source of pictures is a channel.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use hyper::StatusCode;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::client::{self, ClientError};
use super::server::{ApiRequest, BindError, Server};
use super::snapshot::fixture;
use crate::config::DEFAULT_API_SOCKET;

struct Agent {
    directory: TempDir,
    server: JoinHandle<()>,
}

impl Agent {
    /// A server whose owner of the state answers with the fixture.
    async fn start() -> Self {
        let (sender, mut requests) = mpsc::channel(4);
        tokio::spawn(async move {
            while let Some(ApiRequest::Snapshot(reply)) = requests.recv().await {
                let _ = reply.send(fixture::snapshot());
            }
        });
        Self::start_with(sender).await
    }

    async fn start_with(requests: mpsc::Sender<ApiRequest>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::bind(&socket_in(&directory)).await.unwrap();
        Self { server: tokio::spawn(server.serve(requests)), directory }
    }

    fn socket(&self) -> PathBuf {
        socket_in(&self.directory)
    }
}

fn socket_in(directory: &TempDir) -> PathBuf {
    directory.path().join("run").join("lb.sock")
}

/// Sends raw bytes and returns everything that comes back.
async fn raw(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn status_and_targets_arrive_as_they_are() {
    let agent = Agent::start().await;
    assert_eq!(client::status(&agent.socket()).await.unwrap(), fixture::snapshot().status);
    assert_eq!(client::targets(&agent.socket(), None).await.unwrap(), fixture::snapshot().targets);
}

#[tokio::test]
async fn targets_of_one_group() {
    let agent = Agent::start().await;
    let targets = client::targets(&agent.socket(), Some("web")).await.unwrap();
    assert_eq!(targets, fixture::snapshot().targets[1..]);
    let none = client::targets(&agent.socket(), Some("empty")).await.unwrap();
    assert_eq!(none, [], "a group without targets is not unknown");
}

#[tokio::test]
async fn an_unknown_group_is_named_with_those_that_exist() {
    let agent = Agent::start().await;
    for name in ["wbe", "", "a&group=web", "ü #?"] {
        let error = client::targets(&agent.socket(), Some(name)).await.unwrap_err();
        let ClientError::Answer { status, message } = error else { panic!("{error:?}") };
        assert_eq!(status, StatusCode::NOT_FOUND);
        let expected =
            format!("there is no target group `{name}`; there are: empty, resolvers, web");
        assert_eq!(message, expected);
    }
}

#[tokio::test]
async fn other_resources_and_methods_are_refused() {
    let agent = Agent::start().await;
    let answer =
        raw(&agent.socket(), "GET /v2 HTTP/1.1\r\nhost: lb\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert!(answer.ends_with(r#"{"error":"there is no such resource"}"#), "{answer}");
    let answer = raw(&agent.socket(), "DELETE /v1/status HTTP/1.0\r\nhost: lb\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 405 "), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stalls_is_cut_off() {
    let agent = Agent::start().await;
    for beginning in ["", "GET /v1/status HTTP/1.1\r\nhost: "] {
        let begun = Instant::now();
        raw(&agent.socket(), beginning).await;
        let took = begun.elapsed();
        assert!((5..10).contains(&took.as_secs()), "{beginning:?} took {took:?}");
    }
}

#[tokio::test]
async fn the_socket_is_for_root_and_its_group() {
    let agent = Agent::start().await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&agent.socket()), 0o660);
    // The umask may take from it, nothing may add to it.
    assert_eq!(mode(agent.socket().parent().unwrap()) & !0o755, 0);
}

#[tokio::test]
async fn a_second_agent_is_refused_and_the_first_goes_on() {
    let agent = Agent::start().await;
    let error = Server::bind(&agent.socket()).await.unwrap_err();
    assert!(matches!(error, BindError::InUse(_)), "{error:?}");
    assert!(error.to_string().starts_with("another agent is running"), "{error}");
    client::status(&agent.socket()).await.unwrap();
}

#[tokio::test]
async fn the_socket_of_a_dead_agent_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let error = client::status(&socket).await.unwrap_err().to_string();
    assert!(error.contains("a killed agent left it"), "{error}");

    Server::bind(&socket).await.unwrap();
}

#[tokio::test]
async fn what_is_no_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("lb.sock");
    fs::write(&file, "precious").unwrap();
    let error = Server::bind(&file).await.unwrap_err();
    assert!(matches!(error, BindError::NotASocket(_)), "{error:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[tokio::test]
async fn the_socket_goes_with_its_server_only() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    let first = Server::bind(&socket).await.unwrap();
    // Somebody removed it by hand and started another agent.
    fs::remove_file(&socket).unwrap();
    let second = Server::bind(&socket).await.unwrap();
    drop(first);
    assert!(socket.exists(), "the socket of the second is not the first one's to remove");
    drop(second);
    assert!(!socket.exists());
}

#[tokio::test]
async fn without_an_agent_the_client_says_how_to_start_one() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    let error = client::status(&socket).await.unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "no agent is running (no socket at {}): start one with `sudo lb-userspace --iface \
             eth0`, or name its socket with `--api-socket PATH`",
            socket.display()
        )
    );
}

#[tokio::test]
async fn an_agent_that_dies_mid_way_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move { drop(listener.accept().await) });
    let error = client::status(&socket).await.unwrap_err();
    assert!(matches!(error, ClientError::Gone(_)), "{error:?}");
}

#[tokio::test]
async fn an_ending_agent_says_so() {
    let (sender, requests) = mpsc::channel(1);
    drop(requests);
    let agent = Agent::start_with(sender).await;
    let error = client::status(&agent.socket()).await.unwrap_err();
    assert_eq!(error.to_string(), "the agent is ending");
    agent.server.abort();
    assert!(agent.server.await.unwrap_err().is_cancelled());
    assert!(!socket_in(&agent.directory).exists(), "the end of the server removes the socket");
}

#[tokio::test]
async fn an_answer_of_another_shape_suggests_another_version() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
        stream.write_all(answer).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    });
    let error = client::status(&socket).await.unwrap_err();
    assert!(matches!(error, ClientError::Decode(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_hangs_is_not_waited_for_forever() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("lb.sock");
    let _never_accepts = UnixListener::bind(&socket).unwrap();
    let error = client::status(&socket).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout(_)), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_busy_owner_of_the_state_is_reported() {
    let (sender, _unread) = mpsc::channel(1);
    let agent = Agent::start_with(sender).await;
    let error = client::status(&agent.socket()).await.unwrap_err();
    assert_eq!(error.to_string(), "the agent is busy and did not answer; try again");
}

#[test]
fn without_permission_the_client_says_to_become_root() {
    let error = ClientError::Connect {
        socket: DEFAULT_API_SOCKET.into(),
        error: io::ErrorKind::PermissionDenied.into(),
    };
    assert_eq!(error.to_string(), "no permission to use /run/lb/lb.sock: run this as root (sudo)");
}
