//! A client that means well.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use tokio::{runtime, time::sleep};

use crate::{
    http::{Connection, LIMIT, ask, connect, exchange, get},
    scene::Scene,
};

/// Between two of its requests.
const PAUSE: Duration = Duration::from_millis(20);

/// Asks for a page all the time, over a connection that it keeps and over new ones in turn.
pub struct Bystander {
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<Served>>,
}

/// How it was served.
#[derive(Debug, Default)]
pub struct Served {
    pub requests: u32,
    pub slowest: Duration,
    failures: Vec<String>,
}

impl Bystander {
    /// Begins to ask.
    pub fn start(scene: &Scene) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let (flag, at) = (stopped.clone(), scene.http());
        let thread = scene.topology.client.run(|| thread::spawn(move || watch(at, &flag)));
        Self { stopped, thread: Some(thread) }
    }

    /// Ends; every request must have been answered with 200, and each soon enough.
    pub fn finish(mut self) -> Served {
        self.stopped.store(true, Relaxed);
        let served = self.thread.take().unwrap().join().unwrap();
        assert!(served.failures.is_empty(), "{served:?}");
        assert!(served.requests > 0 && served.slowest < LIMIT, "{served:?}");
        served
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.stopped.store(true, Relaxed);
    }
}

fn watch(at: SocketAddr, stopped: &AtomicBool) -> Served {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut served = Served::default();
        let mut kept = None;
        while !stopped.load(Relaxed) {
            let began = Instant::now();
            let status = if served.requests % 2 == 0 {
                over_kept(at, &mut kept).await
            } else {
                ask(at, get("/")).await.map(|answer| answer.status)
            };
            let took = began.elapsed();
            served.requests += 1;
            served.slowest = served.slowest.max(took);
            if !matches!(status, Ok(200)) {
                served.failures.push(format!("{status:?} after {took:?}"));
            }
            sleep(PAUSE).await;
        }
        served
    })
}

async fn over_kept(at: SocketAddr, kept: &mut Option<Connection>) -> io::Result<u16> {
    let connection = match kept {
        Some(connection) => connection,
        None => kept.insert(connect(at).await?),
    };
    let status = exchange(connection, get("/").as_bytes()).await.map(|answer| answer.status);
    if status.is_err() {
        *kept = None;
    }
    status
}
