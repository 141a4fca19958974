//! The threads: each has its own runtime, sockets and connections to targets, and shares nothing
//! but what is read.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::buffer;
use super::descriptors::{Descriptors, Seldom};
use super::listener;
use super::table::{Groups, Listener};
use super::upstream::{Connector, Pool};

/// Between two looks at idle connections.
const SWEEP: Duration = Duration::from_secs(5);

/// Between two looks at how requests end.
const MITIGATION: Duration = Duration::from_secs(10);

/// Connections that are told why they are refused, at a time. Further ones are closed: what has no
/// capacity should not spend it on saying so.
const REFUSALS: usize = 64;

/// A thread, as its tasks see it.
#[derive(Debug)]
pub struct Worker {
    /// Which.
    pub index: usize,
    /// Idle connections to targets.
    pub pool: Arc<Pool>,
    /// Opens connections to targets.
    pub connector: Connector,
    /// The target groups that there are now.
    pub groups: Arc<ArcSwap<Groups>>,
    /// How many connections of clients it has.
    pub connections: watch::Sender<usize>,
    /// For connections that are told why they are refused.
    pub refusals: Arc<Semaphore>,
    /// How many there may be.
    pub descriptors: Descriptors,
    /// Says that they are used up.
    pub exhausted: Seldom,
}

impl Worker {
    /// Bytes that a client's connection reads or writes at a time, at most.
    pub fn buffer(&self) -> usize {
        buffer(*self.connections.borrow())
    }
}

/// A thread, as the handle sees it.
#[derive(Debug)]
pub struct WorkerHandle {
    /// New sockets; the thread ends when this is dropped.
    sockets: mpsc::UnboundedSender<(TcpListener, Arc<Listener>)>,
    /// How many connections of clients it has.
    connections: watch::Receiver<usize>,
    thread: thread::JoinHandle<()>,
}

impl WorkerHandle {
    /// Starts a thread.
    ///
    /// # Errors
    /// If the system has no thread or descriptor for it.
    pub fn start(index: usize, groups: Arc<ArcSwap<Groups>>) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (sockets, incoming) = mpsc::unbounded_channel();
        let sender = watch::Sender::new(0);
        let connections = sender.subscribe();
        let descriptors = Descriptors::of_process();
        let thread = thread::Builder::new().name(format!("proxy-{index}")).spawn(move || {
            let worker = Arc::new(Worker {
                index,
                pool: Arc::default(),
                connector: Connector::new(index, descriptors, sender.subscribe()),
                groups,
                connections: sender,
                refusals: Arc::new(Semaphore::new(REFUSALS)),
                descriptors,
                exhausted: Seldom::default(),
            });
            runtime.block_on(run(worker, incoming));
        })?;
        Ok(Self { sockets, connections, thread })
    }

    /// Accepts connections from this socket, too.
    pub fn listen(&self, socket: TcpListener, listener: Arc<Listener>) {
        // A thread that has ended is noticed by `end`, and a panic in one by the log.
        let _ = self.sockets.send((socket, listener));
    }

    /// Waits until it has no connections any more.
    pub async fn idle(&self) {
        let _ = self.connections.clone().wait_for(|connections| *connections == 0).await;
    }

    /// Ends it with all connections that it has.
    pub fn end(self) {
        drop(self.sockets);
        // A panic has been reported where it happened.
        let _ = self.thread.join();
    }
}

async fn run(
    worker: Arc<Worker>,
    mut sockets: mpsc::UnboundedReceiver<(TcpListener, Arc<Listener>)>,
) {
    let mut sweep = interval(SWEEP);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut mitigation = interval(MITIGATION);
    mitigation.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            socket = sockets.recv() => match socket {
                Some((socket, listener)) => listener::accept(&worker, socket, listener),
                None => return,
            },
            _ = sweep.tick() => worker.pool.sweep(Instant::now()),
            _ = mitigation.tick(), if worker.index == 0 => worker.groups.load().mitigate(),
        }
    }
}
