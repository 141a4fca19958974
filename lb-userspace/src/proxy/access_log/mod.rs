//! Access logs: a line for each request, written by a thread of its own.
//!
//! A request hands its line over and goes on: if the writer is behind by [`MOST_WAITING`] bytes,
//! because a disk is slow or nobody reads the standard output, the line is dropped and counted.
//! Lines are written in blocks; whatever waits is written as soon as there is nothing more to
//! gather.

mod entry;

pub use entry::{Entry, RequestLine, TlsEntry};

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::model::LogSink;

/// The most bytes of lines that wait to be written.
const MOST_WAITING: usize = 16 << 20;
/// The most lines that wait.
const MOST_LINES: usize = 1 << 15;
/// Bytes that are written at once, or a little more.
const BLOCK: usize = 64 << 10;

/// A log.
#[derive(Debug)]
pub struct AccessLog {
    lines: SyncSender<String>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: AtomicUsize,
    dropped: AtomicU64,
    failed: AtomicU64,
    reopen: AtomicBool,
}

impl AccessLog {
    /// Opens a log and starts its writer, which ends once the log is dropped and all lines are
    /// written.
    ///
    /// # Errors
    /// If the file cannot be opened, or the system has no thread.
    fn open(sink: &LogSink) -> io::Result<(Self, JoinHandle<()>)> {
        let output = Output::open(sink)?;
        let (lines, waiting) = sync_channel(MOST_LINES);
        let shared = Arc::<Shared>::default();
        let writer = Writer { output, lines: waiting, shared: shared.clone() };
        let thread =
            std::thread::Builder::new().name("access-log".to_owned()).spawn(|| writer.run())?;
        Ok((Self { lines, shared }, thread))
    }

    /// Hands a line over, with its end. Never waits.
    pub fn write(&self, line: String) {
        let bytes = line.len();
        if self.shared.waiting.fetch_add(bytes, Relaxed) + bytes > MOST_WAITING {
            self.drop_line(bytes);
        } else if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            self.lines.try_send(line)
        {
            self.drop_line(bytes);
        }
    }

    fn drop_line(&self, bytes: usize) {
        self.shared.waiting.fetch_sub(bytes, Relaxed);
        self.shared.dropped.fetch_add(1, Relaxed);
    }

    /// Lines that were never written: the writer was behind, or it failed.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed) + self.shared.failed.load(Relaxed)
    }

    /// Opens the file again, after it was renamed: before the next line, or now if none waits.
    pub fn reopen(&self) {
        self.shared.reopen.store(true, Relaxed);
        // Nothing to write wakes the writer; one whose queue is full is awake.
        let _ = self.lines.try_send(String::new());
    }
}

/// Where lines go.
enum Output {
    Stdout,
    File { file: File, path: Box<Path> },
}

impl Output {
    fn open(sink: &LogSink) -> io::Result<Self> {
        Ok(match sink {
            LogSink::Stdout => Self::Stdout,
            LogSink::File(path) => Self::File { file: append(path)?, path: path.as_path().into() },
        })
    }

    /// A file that cannot be opened again goes on as it was.
    fn reopen(&mut self) {
        let Self::File { file, path } = self else { return };
        match append(path) {
            Ok(again) => *file = again,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "access log not opened again");
            }
        }
    }

    fn write(&mut self, block: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(block)?;
                stdout.flush()
            }
            Self::File { file, .. } => file.write_all(block),
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

struct Writer {
    output: Output,
    lines: Receiver<String>,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(mut self) {
        let mut was_ok = true;
        while let Ok(first) = self.lines.recv() {
            let mut block = first.into_bytes();
            let mut count = 1;
            while block.len() < BLOCK {
                match self.lines.try_recv() {
                    Ok(line) => block.extend_from_slice(line.as_bytes()),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
                count += 1;
            }
            if self.shared.reopen.swap(false, Relaxed) {
                self.output.reopen();
            }
            let written = self.output.write(&block);
            self.shared.waiting.fetch_sub(block.len(), Relaxed);
            if let Err(error) = &written {
                self.shared.failed.fetch_add(count, Relaxed);
                // Once, not for every block.
                if was_ok {
                    tracing::warn!(%error, "access log cannot be written");
                }
            }
            was_ok = written.is_ok();
        }
    }
}

/// All logs: one for each file, however many load balancers write to it.
#[derive(Debug, Default)]
pub struct AccessLogs(Mutex<BTreeMap<LogSink, Running>>);

/// A log for as long as somebody uses it, and its writer.
type Running = (Weak<AccessLog>, JoinHandle<()>);

impl AccessLogs {
    /// The log of a sink, opened if it is not. It is closed when its last user drops it.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn get(&self, sink: &LogSink) -> io::Result<Arc<AccessLog>> {
        let mut logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = logs.get(sink).and_then(|(log, _)| log.upgrade()) {
            return Ok(log);
        }
        let (log, thread) = AccessLog::open(sink)?;
        let log = Arc::new(log);
        logs.insert(sink.clone(), (Arc::downgrade(&log), thread));
        Ok(log)
    }

    /// Opens all files again.
    pub fn reopen(&self) {
        let logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        logs.values().filter_map(|(log, _)| log.upgrade()).for_each(|log| log.reopen());
    }

    /// Waits for at most so long until all lines are written. Every user must have dropped its log.
    /// Whether they are; nobody may read the standard output.
    pub fn finish(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if logs.values().all(|(_, thread)| thread.is_finished()) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn every_line_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "old\n").unwrap();
        let logs = AccessLogs::default();
        let log = logs.get(&LogSink::File(path.clone())).unwrap();
        assert!(Arc::ptr_eq(&log, &logs.get(&LogSink::File(path.clone())).unwrap()));
        for i in 0..10_000 {
            log.write(format!("{i}\n"));
        }
        assert_eq!(log.dropped(), 0);
        drop(log);
        assert!(logs.finish(PATIENCE));
        let want: String = (0..10_000).map(|i| format!("{i}\n")).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("old\n{want}"));
    }

    #[test]
    fn a_renamed_file_is_left_alone_after_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("log.1"));
        let logs = AccessLogs::default();
        let log = logs.get(&LogSink::File(path.clone())).unwrap();
        log.write("before\n".to_owned());
        let end = Instant::now() + PATIENCE;
        while fs::read_to_string(&path).unwrap().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        fs::rename(&path, &old).unwrap();
        logs.reopen();
        log.write("after\n".to_owned());
        drop(log);
        assert!(logs.finish(PATIENCE));
        assert_eq!(fs::read_to_string(&old).unwrap(), "before\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "after\n");
    }

    #[test]
    fn a_writer_that_is_behind_costs_lines_and_no_time() {
        // Nobody receives here, as if the writer were stuck.
        let (lines, _stuck) = sync_channel(MOST_LINES);
        let log = AccessLog { lines, shared: Arc::default() };
        let line = "x".repeat(1 << 20);
        (0..16).for_each(|_| log.write(line.clone()));
        assert_eq!(log.dropped(), 0);
        log.write("y".to_owned());
        assert_eq!(log.dropped(), 1);
        assert_eq!(log.shared.waiting.load(Relaxed), MOST_WAITING);

        let (lines, _stuck) = sync_channel(MOST_LINES);
        let log = AccessLog { lines, shared: Arc::default() };
        (0..MOST_LINES + 3).for_each(|_| log.write("\n".to_owned()));
        assert_eq!(log.dropped(), 3);
    }

    #[test]
    fn a_full_disk_is_counted() {
        let logs = AccessLogs::default();
        let log = logs.get(&LogSink::File("/dev/full".into())).unwrap();
        let shared = log.shared.clone();
        (0..100).for_each(|_| log.write("line\n".to_owned()));
        drop(log);
        assert!(logs.finish(PATIENCE));
        assert_eq!(shared.failed.load(Relaxed), 100);
        assert_eq!(shared.waiting.load(Relaxed), 0);
    }

    #[test]
    fn what_cannot_be_opened_is_an_error() {
        let sink = LogSink::File("/nonexistent/log".into());
        assert!(AccessLogs::default().get(&sink).is_err());
    }
}
