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

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncWriteExt as _, BufReader},
    net::TcpStream,
    runtime,
    time::{sleep, timeout},
};

use crate::{
    http::{Connection, LIMIT, answer, ask, connect, exchange, get},
    scene::Scene,
    world::World,
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

/// Its connection, and when it was last used.
struct Kept {
    connection: Connection,
    since: Instant,
}

impl Bystander {
    /// Begins to ask.
    pub fn start<S>(world: &World<S>) -> Self {
        let at = world.at(80)[0];
        Self::begin(world, async move |kept: &mut Option<_>, is_new| {
            if is_new {
                return ask(at, get("/")).await.map(|answer| answer.status);
            }
            over_kept(at, kept).await
        })
    }

    /// The same in TLS, over new connections.
    pub fn start_secure(scene: &Scene) -> Self {
        let (at, connector) = (scene.https(), scene.authority.connector());
        let name = ServerName::try_from(scene.name.clone()).unwrap();
        Self::begin(scene, async move |_: &mut Option<_>, _| {
            let stream = timeout(LIMIT, TcpStream::connect(at)).await??;
            let stream = timeout(LIMIT, connector.connect(name.clone(), stream)).await??;
            let mut stream = BufReader::new(stream);
            stream.write_all(get("/").as_bytes()).await?;
            Ok(timeout(LIMIT, answer(&mut stream)).await??.status)
        })
    }

    fn begin<S>(
        world: &World<S>,
        ask: impl AsyncFn(&mut Option<Kept>, bool) -> io::Result<u16> + Send + 'static,
    ) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let flag = stopped.clone();
        let thread = world.topology.client.run(|| thread::spawn(move || watch(&flag, ask)));
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

fn watch(
    stopped: &AtomicBool,
    ask: impl AsyncFn(&mut Option<Kept>, bool) -> io::Result<u16>,
) -> Served {
    let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut served = Served::default();
        let mut kept = None;
        while !stopped.load(Relaxed) {
            let began = Instant::now();
            let status = ask(&mut kept, served.requests % 2 == 1).await;
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

async fn over_kept(at: SocketAddr, kept: &mut Option<Kept>) -> io::Result<u16> {
    // One that was not used for long may be closed at any time.
    let fresh = kept.take().filter(|it| it.since.elapsed() < Duration::from_secs(1));
    let mut connection = match fresh {
        Some(kept) => kept.connection,
        None => connect(at).await?,
    };
    let status = exchange(&mut connection, get("/").as_bytes()).await?.status;
    *kept = Some(Kept { connection, since: Instant::now() });
    Ok(status)
}
