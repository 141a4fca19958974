//! The agent's side of the API. It owns no state: each request asks the state's owner for a fresh
//! [`Snapshot`] over a channel.

use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{error, fmt, fs};

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde::Deserialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::ErrorBody;
use super::snapshot::{Snapshot, Status, Target};

/// How long a client may take to send its request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the owner of the state may take to answer.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one connection may last, whatever it does.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections served at once; further ones wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 64;
/// Pause after a failed accept (no descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the API asks of the owner of the state.
#[derive(Debug)]
pub enum ApiRequest {
    /// A picture of now.
    Snapshot(oneshot::Sender<Snapshot>),
}

/// The bound socket. Dropping it removes the socket file.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file, to remove no other one.
    file: (u64, u64),
}

impl Server {
    /// Binds the socket at `path`, mode 0660, and makes its directory if need be. A socket that a
    /// dead agent left behind is replaced.
    ///
    /// # Errors
    /// [`BindError`]; in particular if somebody listens there already.
    pub async fn bind(path: &Path) -> Result<Self, BindError> {
        let at = |step| move |error| BindError::Io { path: path.to_owned(), step, error };
        if let Some(directory) = path.parent().filter(|it| !it.as_os_str().is_empty()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .map_err(at("make the directory of"))?;
        }
        remove_stale(path).await?;
        let listener = UnixListener::bind(path).map_err(at("bind"))?;
        let metadata = fs::symlink_metadata(path).map_err(at("look at"))?;
        let server =
            Self { listener, path: path.to_owned(), file: (metadata.dev(), metadata.ino()) };
        fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(at("set mode of"))?;
        Ok(server)
    }

    /// Serves until the future is dropped. Failures of single connections end those only.
    pub async fn serve(self, requests: mpsc::Sender<ApiRequest>) {
        let service = TowerToHyperService::new(router(requests));
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let slot = Arc::clone(&slots).acquire_owned().await;
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!(%error, "the API cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service.clone());
            tokio::spawn(async move {
                match timeout(CONNECTION_TIMEOUT, connection).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => debug!(%error, "an API connection failed"),
                    Err(_) => debug!("an API connection took too long"),
                }
                drop(slot);
            });
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "cannot remove the API socket");
        }
    }
}

/// Removes a socket file that nobody listens on.
async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let at = |step, error| BindError::Io { path: path.to_owned(), step, error };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at("look at", error)),
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| at("remove the stale", error))
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(at("look for another agent at", error))
        }
        // Also any other failure, such as a full backlog: when in doubt somebody is there.
        _ => Err(BindError::InUse(path.to_owned())),
    }
}

/// Why the socket could not be bound.
#[derive(Debug)]
pub enum BindError {
    /// Somebody listens on it.
    InUse(PathBuf),
    /// Something that is not a socket stands at its path.
    NotASocket(PathBuf),
    /// The system refused a step.
    Io {
        /// The socket.
        path: PathBuf,
        /// The step, completed by "the API socket".
        step: &'static str,
        /// The system's answer.
        error: io::Error,
    },
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InUse(path) => write!(
                f,
                "another agent is running: it listens on {}; end it first, or give this one a \
                 socket of its own with `--api-socket PATH`",
                path.display()
            ),
            Self::NotASocket(path) => write!(
                f,
                "{} exists and is not a socket; choose another path with `--api-socket PATH`",
                path.display()
            ),
            Self::Io { path, step, error } => {
                write!(f, "cannot {step} the API socket {}: {error}", path.display())
            }
        }
    }
}

impl error::Error for BindError {}

fn router(requests: mpsc::Sender<ApiRequest>) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/targets", get(targets))
        .fallback(async || Failure(StatusCode::NOT_FOUND, "there is no such resource".into()))
        .method_not_allowed_fallback(async || {
            Failure(StatusCode::METHOD_NOT_ALLOWED, "this resource can only be read".into())
        })
        .with_state(requests)
}

async fn status(State(requests): State<mpsc::Sender<ApiRequest>>) -> Result<Json<Status>, Failure> {
    Ok(Json(snapshot(&requests).await?.status))
}

#[derive(Deserialize)]
struct TargetsQuery {
    group: Option<String>,
}

async fn targets(
    State(requests): State<mpsc::Sender<ApiRequest>>,
    Query(query): Query<TargetsQuery>,
) -> Result<Json<Vec<Target>>, Failure> {
    let Snapshot { target_groups, mut targets, .. } = snapshot(&requests).await?;
    if let Some(group) = query.group {
        if !target_groups.contains(&group) {
            return Err(Failure(StatusCode::NOT_FOUND, unknown_group(&group, &target_groups)));
        }
        targets.retain(|target| target.target_group == group);
    }
    Ok(Json(targets))
}

fn unknown_group(group: &str, known: &[String]) -> String {
    if known.is_empty() {
        format!("there is no target group `{group}`: the configuration has none")
    } else {
        format!("there is no target group `{group}`; there are: {}", known.join(", "))
    }
}

async fn snapshot(requests: &mpsc::Sender<ApiRequest>) -> Result<Snapshot, Failure> {
    let ask = async {
        let (reply, answer) = oneshot::channel();
        requests.send(ApiRequest::Snapshot(reply)).await.ok()?;
        answer.await.ok()
    };
    let unavailable = |text: &str| Failure(StatusCode::SERVICE_UNAVAILABLE, text.into());
    match timeout(SNAPSHOT_TIMEOUT, ask).await {
        Ok(Some(snapshot)) => Ok(snapshot),
        Ok(None) => Err(unavailable("the agent is ending")),
        Err(_) => Err(unavailable("the agent is busy and did not answer; try again")),
    }
}

/// An answer that is not a success: its status and a sentence for humans.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}
