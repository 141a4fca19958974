//! A target that keeps every byte that it gets, and answers what the oracle takes for requests.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::harness::{LIMIT, origin};
use crate::oracle::{Message, Read, request};

/// What came over one connection.
#[derive(Debug, Default)]
pub struct Record {
    pub requests: Vec<Message>,
    /// When each of them came, among all of the target's.
    pub order: Vec<u64>,
    /// What came behind them, and is none.
    pub rest: Vec<u8>,
    /// Why the rest never becomes one.
    pub invalid: Option<String>,
    ended: bool,
}

impl Record {
    fn push(&mut self, message: Message) {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.order.push(NEXT.fetch_add(1, Ordering::Relaxed));
        self.requests.push(message);
    }
}

/// An answer that a test wrote.
#[derive(Debug, Clone)]
pub struct Script {
    pub bytes: Vec<u8>,
    pub closes: bool,
}

/// The target.
#[derive(Debug, Clone)]
pub struct Target {
    pub address: SocketAddr,
    records: Arc<Mutex<Vec<Arc<Mutex<Record>>>>>,
}

/// What the target answers a request with: what it took it for.
pub fn echo(message: &Message) -> String {
    let (method, target) = message.method_and_target();
    format!("{method} {target} {}", message.body.len())
}

impl Target {
    /// Starts one. It answers requests for paths that have a script with that.
    pub async fn start(scripts: HashMap<String, Script>) -> Self {
        let records = Arc::new(Mutex::new(Vec::new()));
        let scripts = Arc::new(scripts);
        let address = {
            let records = records.clone();
            origin(move |stream| {
                let record = Arc::new(Mutex::new(Record::default()));
                records.lock().unwrap().push(record.clone());
                let scripts = scripts.clone();
                async move {
                    serve(stream, &record, &scripts).await;
                    record.lock().unwrap().ended = true;
                }
            })
            .await
        };
        Self { address, records }
    }

    /// What came over each connection, once all have ended.
    pub async fn records(self) -> Vec<Record> {
        let all_ended = async {
            while !self.records.lock().unwrap().iter().all(|it| it.lock().unwrap().ended) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(LIMIT, all_ended).await.unwrap();
        let mut records = self.records.lock().unwrap();
        records.drain(..).map(|it| std::mem::take(&mut *it.lock().unwrap())).collect()
    }
}

async fn serve(mut stream: TcpStream, record: &Mutex<Record>, scripts: &HashMap<String, Script>) {
    let mut bytes = Vec::new();
    while let Ok(1..) = stream.read_buf(&mut bytes).await {
        while let Some(message) = next(&mut bytes, record) {
            let (method, target) = message.method_and_target();
            let script = scripts.get(target).cloned().unwrap_or_else(|| {
                let body = if method == "HEAD" { String::new() } else { echo(&message) };
                let length = echo(&message).len();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
                Script { bytes: answer.into_bytes(), closes: false }
            });
            record.lock().unwrap().push(message);
            if stream.write_all(&script.bytes).await.is_err() {
                break;
            }
            if script.closes {
                let _ = stream.shutdown().await;
            }
        }
        let mut record = record.lock().unwrap();
        record.rest.clone_from(&bytes);
        if record.invalid.is_some() {
            return;
        }
    }
}

fn next(bytes: &mut Vec<u8>, record: &Mutex<Record>) -> Option<Message> {
    match request(bytes) {
        Read::Whole(message, used) => {
            bytes.drain(..used);
            Some(message)
        }
        Read::Part => None,
        Read::Invalid(why) => {
            record.lock().unwrap().invalid = Some(why);
            None
        }
    }
}
