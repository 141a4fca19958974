//! The commands' side of the API.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{error, fmt, io};

use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::ErrorBody;
use super::snapshot::{Status, Target};

/// How long a whole request may take; longer than the agent's own limit for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Asks the agent at `socket` for its status.
///
/// # Errors
/// [`ClientError`], which says what to do.
pub async fn status(socket: &Path) -> Result<Status, ClientError> {
    get(socket, "/v1/status").await
}

/// Asks the agent at `socket` for its targets, of all groups or of one.
///
/// # Errors
/// [`ClientError`], which says what to do; [`ClientError::Answer`] for an unknown group.
pub async fn targets(socket: &Path, group: Option<&str>) -> Result<Vec<Target>, ClientError> {
    match group {
        None => get(socket, "/v1/targets").await,
        Some(group) => {
            let group = utf8_percent_encode(group, NON_ALPHANUMERIC);
            get(socket, &format!("/v1/targets?group={group}")).await
        }
    }
}

async fn get<T: DeserializeOwned>(socket: &Path, resource: &str) -> Result<T, ClientError> {
    let (status, body) = timeout(TIMEOUT, exchange(socket, resource))
        .await
        .map_err(|_| ClientError::Timeout(socket.to_owned()))??;
    if status == StatusCode::OK {
        return serde_json::from_slice(&body).map_err(ClientError::Decode);
    }
    let message = serde_json::from_slice(&body).map_or_else(
        |_| format!("{status}: {}", String::from_utf8_lossy(&body)),
        |body: ErrorBody| body.error,
    );
    Err(ClientError::Answer { status, message })
}

/// One request and its answer's status and body.
async fn exchange(socket: &Path, resource: &str) -> Result<(StatusCode, Bytes), ClientError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| ClientError::Connect { socket: socket.to_owned(), error })?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(ClientError::Gone)?;
    let request = Request::get(resource)
        .header(header::HOST, "lb")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .expect("a percent-encoded resource and constant headers make a valid request");
    // Ends with the answer, or with the runtime; what goes wrong with it shows at the answer.
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(ClientError::Gone)?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(ClientError::Gone)?;
    Ok((status, body.to_bytes()))
}

/// Why the agent gave no answer.
#[derive(Debug)]
pub enum ClientError {
    /// No connection to the socket.
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// The connection ended before the answer was complete.
    Gone(hyper::Error),
    /// No complete answer within 10 s.
    Timeout(PathBuf),
    /// The agent refused, with a sentence for humans.
    Answer {
        /// The HTTP status.
        status: StatusCode,
        /// The sentence.
        message: String,
    },
    /// The answer is not of the expected shape.
    Decode(serde_json::Error),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const START: &str = "start one with `sudo lb-userspace --iface eth0`";
        match self {
            Self::Connect { socket, error } => {
                let socket = socket.display();
                match error.kind() {
                    io::ErrorKind::NotFound => write!(
                        f,
                        "no agent is running (no socket at {socket}): {START}, or name its socket \
                         with `--api-socket PATH`"
                    ),
                    io::ErrorKind::ConnectionRefused => write!(
                        f,
                        "no agent is running (nobody listens on {socket}, a killed agent left it): \
                         {START}"
                    ),
                    io::ErrorKind::PermissionDenied => {
                        write!(f, "no permission to use {socket}: run this as root (sudo)")
                    }
                    _ => write!(f, "cannot connect to the agent at {socket}: {error}"),
                }
            }
            Self::Gone(error) => write!(f, "the agent went away before it answered ({error})"),
            Self::Timeout(socket) => write!(
                f,
                "the agent at {} did not answer within {} s",
                socket.display(),
                TIMEOUT.as_secs()
            ),
            Self::Answer { message, .. } => f.write_str(message),
            Self::Decode(error) => write!(
                f,
                "the agent's answer is not understood ({error}): is it of another version than \
                 this command ({})?",
                env!("CARGO_PKG_VERSION")
            ),
        }
    }
}

impl error::Error for ClientError {}
