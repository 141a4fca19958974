//! Counters, named after CloudWatch's.
//!
//! Each worker thread has its own, so that none waits for another's cache lines; readers add them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

macro_rules! metrics {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What is counted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Metric { $($(#[$doc])* $variant,)* }

        impl Metric {
            /// All of them, in the order of their discriminants.
            const ALL: &[Self] = &[$(Self::$variant,)*];

            /// CloudWatch's name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

metrics! {
    /// Connections of clients, and to targets, that are open now (the one gauge). One to a target is
    /// counted where the request came that it was opened for.
    ActiveConnections = "ActiveConnectionCount",
    /// Connections of clients, and to targets, that were opened.
    NewConnections = "NewConnectionCount",
    /// Connections that were refused because there were as many as there may be.
    RejectedConnections = "RejectedConnectionCount",
    /// TLS handshakes of clients that failed.
    ClientTlsErrors = "ClientTLSNegotiationErrorCount",
    /// Bytes from and to clients, inside TLS.
    ProcessedBytes = "ProcessedBytes",
    /// Requests for which there was a target.
    Requests = "RequestCount",
    /// The same, of gRPC.
    GrpcRequests = "GrpcRequestCount",
    /// Redirections.
    Redirects = "HTTP_Redirect_Count",
    /// Fixed responses.
    FixedResponses = "HTTP_Fixed_Response_Count",
    /// Answers of the load balancer itself: redirections.
    Elb3xx = "HTTPCode_ELB_3XX_Count",
    /// Answers of the load balancer itself: the client's fault, with 460.
    Elb4xx = "HTTPCode_ELB_4XX_Count",
    /// Answers of the load balancer itself: not the client's fault.
    Elb5xx = "HTTPCode_ELB_5XX_Count",
    /// The load balancer's own 500.
    Elb500 = "HTTPCode_ELB_500_Count",
    /// The load balancer's own 502.
    Elb502 = "HTTPCode_ELB_502_Count",
    /// The load balancer's own 503.
    Elb503 = "HTTPCode_ELB_503_Count",
    /// The load balancer's own 504.
    Elb504 = "HTTPCode_ELB_504_Count",
    /// Requests that the desync mitigation found not to comply with the RFC.
    DesyncNonCompliant = "DesyncMitigationMode_NonCompliant_Request_Count",
    /// Requests of which header fields with invalid names were taken out.
    DroppedInvalidHeaders = "DroppedInvalidHeaderRequestCount",
    /// Answers of targets.
    Target2xx = "HTTPCode_Target_2XX_Count",
    /// Answers of targets.
    Target3xx = "HTTPCode_Target_3XX_Count",
    /// Answers of targets.
    Target4xx = "HTTPCode_Target_4XX_Count",
    /// Answers of targets.
    Target5xx = "HTTPCode_Target_5XX_Count",
    /// Connections to targets that could not be opened.
    TargetConnectionErrors = "TargetConnectionErrorCount",
    /// TLS handshakes with targets that failed.
    TargetTlsErrors = "TargetTLSNegotiationErrorCount",
    /// Connections of clients that were opened to a `tls` listener.
    NewTlsFlows = "NewFlowCount_TLS",
}

/// What is counted for a load balancer.
const OF_LOAD_BALANCERS: std::ops::Range<usize> = 0..Metric::Target2xx as usize;
const COUNT: usize = Metric::NewTlsFlows as usize + 1;

/// Upper bounds of the buckets of `TargetResponseTime`, in microseconds; one more is unbounded.
pub const RESPONSE_TIME_BOUNDS: [u64; 16] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// What one thread counts. Aligned to two cache lines, which processors fetch in pairs.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    counts: [AtomicU64; COUNT],
    response_times: [AtomicU64; RESPONSE_TIME_BOUNDS.len() + 1],
    response_time_micros: AtomicU64,
}

impl Shard {
    fn new() -> Self {
        Self {
            counts: [const { AtomicU64::new(0) }; COUNT],
            response_times: [const { AtomicU64::new(0) }; RESPONSE_TIME_BOUNDS.len() + 1],
            response_time_micros: AtomicU64::new(0),
        }
    }
}

/// Counters of one load balancer, or of one target.
#[derive(Debug)]
pub struct Shards(Box<[Shard]>);

impl Shards {
    /// Zeros, for so many threads.
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Shard::new()).collect())
    }

    /// One more.
    pub fn count(&self, worker: usize, metric: Metric) {
        self.add(worker, metric, 1);
    }

    /// So many more.
    pub fn add(&self, worker: usize, metric: Metric, n: u64) {
        self.0[worker].counts[metric as usize].fetch_add(n, Relaxed);
    }

    /// One less; of the gauge only.
    pub fn uncount(&self, worker: usize, metric: Metric) {
        self.0[worker].counts[metric as usize].fetch_sub(1, Relaxed);
    }

    /// A target took so long from the request's last byte to the answer's head.
    pub fn response_time(&self, worker: usize, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = RESPONSE_TIME_BOUNDS.partition_point(|&bound| bound < micros);
        self.0[worker].response_times[bucket].fetch_add(1, Relaxed);
        self.0[worker].response_time_micros.fetch_add(micros, Relaxed);
    }

    /// The sum of all threads. A gauge of one thread may be behind what another counts down.
    pub fn total(&self, metric: Metric) -> u64 {
        self.0
            .iter()
            .fold(0_u64, |sum, it| sum.wrapping_add(it.counts[metric as usize].load(Relaxed)))
    }

    fn counts(&self, of_load_balancer: bool) -> BTreeMap<&'static str, u64> {
        Metric::ALL
            .iter()
            .filter(|&&it| of_load_balancer || !OF_LOAD_BALANCERS.contains(&(it as usize)))
            .map(|&it| (it.name(), self.total(it)))
            .collect()
    }

    fn histogram(&self) -> Histogram {
        let bucket = |n: usize| self.0.iter().map(|it| it.response_times[n].load(Relaxed)).sum();
        let micros: u64 = self.0.iter().map(|it| it.response_time_micros.load(Relaxed)).sum();
        Histogram {
            buckets: (0..=RESPONSE_TIME_BOUNDS.len()).map(bucket).collect(),
            sum_seconds: Duration::from_micros(micros).as_secs_f64(),
        }
    }

    /// What a load balancer's say now.
    pub fn load_balancer(&self) -> LoadBalancerCounters {
        LoadBalancerCounters { counts: self.counts(true), target_response_time: self.histogram() }
    }

    /// What a target's say now.
    pub fn target(&self) -> TargetCounters {
        let mut counts = self.counts(false);
        counts.insert(Metric::Requests.name(), self.total(Metric::Requests));
        TargetCounters { counts, target_response_time: self.histogram() }
    }
}

/// All counters at one moment. They count from when the proxy first served what they are about.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Counters {
    /// By the load balancer's name.
    pub load_balancers: BTreeMap<Arc<str>, LoadBalancerCounters>,
    /// By the target group's name.
    pub target_groups: BTreeMap<Arc<str>, GroupCounters>,
}

/// What was counted for a load balancer.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LoadBalancerCounters {
    /// By CloudWatch's name.
    #[serde(flatten)]
    pub counts: BTreeMap<&'static str, u64>,
    /// Of all its targets.
    #[serde(rename = "TargetResponseTime")]
    pub target_response_time: Histogram,
}

/// What was counted for a target group.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct GroupCounters {
    /// By the target.
    pub targets: BTreeMap<SocketAddr, TargetCounters>,
}

/// What was counted for a target.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TargetCounters {
    /// By CloudWatch's name.
    #[serde(flatten)]
    pub counts: BTreeMap<&'static str, u64>,
    /// How long it took to answer.
    #[serde(rename = "TargetResponseTime")]
    pub target_response_time: Histogram,
}

/// How long things took.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Histogram {
    /// How many took at most as long as [`RESPONSE_TIME_BOUNDS`] say, each counted once, in the
    /// first that holds it; the last one is of those that took longer.
    pub buckets: Vec<u64>,
    /// The sum of all.
    pub sum_seconds: f64,
}
