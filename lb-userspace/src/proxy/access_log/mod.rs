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
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::config::model::LogSink;

/// The most bytes of lines that wait to be written.
const MOST_WAITING: usize = 16 << 20;
/// The most lines that wait.
const MOST_LINES: usize = 1 << 15;
/// Between two attempts to open a file, while no line comes.
const AGAIN: Duration = Duration::from_secs(1);
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
    /// Why lines are not written, if so.
    problem: Mutex<Option<String>>,
}

impl AccessLog {
    /// Starts a log's writer, which opens the file, and ends once the log is dropped and all lines
    /// are written.
    ///
    /// # Errors
    /// If the system has no thread.
    fn start(sink: &LogSink) -> io::Result<(Self, JoinHandle<()>)> {
        let (lines, waiting) = sync_channel(MOST_LINES);
        let shared = Arc::<Shared>::default();
        let writer = Writer { sink: sink.clone(), lines: waiting, shared: shared.clone() };
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
    File(File),
}

impl Output {
    fn open(sink: &LogSink) -> io::Result<Self> {
        Ok(match sink {
            LogSink::Stdout => Self::Stdout,
            LogSink::File(path) => Self::File(append(path)?),
        })
    }

    fn write(&mut self, block: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(block)?;
                stdout.flush()
            }
            Self::File(file) => file.write_all(block),
        }
    }
}

/// A pipe that nobody reads is an error at once; one that is read slowly makes its writer wait.
fn append(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK;
    let file =
        OpenOptions::new().create(true).append(true).custom_flags(flags.bits()).open(path)?;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(file)
}

struct Writer {
    sink: LogSink,
    lines: Receiver<String>,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(self) {
        let mut output = self.open();
        // Whether it should be another: a file that cannot be opened again goes on as it was.
        let mut is_stale = output.is_none();
        loop {
            let first = match self.lines.recv_timeout(AGAIN) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => String::new(),
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let (block, count) = self.gather(first);
            if self.shared.reopen.swap(false, Relaxed) || is_stale {
                let again = self.open();
                is_stale = again.is_none();
                output = again.or(output);
            }
            if block.is_empty() {
                continue;
            }
            let written = output.as_mut().map(|output| output.write(&block));
            self.shared.waiting.fetch_sub(block.len(), Relaxed);
            match written {
                Some(Ok(())) if is_stale => {}
                Some(Ok(())) => self.shared.set_problem(None),
                Some(Err(error)) => self.fail(count, Some(&error)),
                None => self.fail(count, None),
            }
        }
    }

    fn gather(&self, first: String) -> (Vec<u8>, u64) {
        let mut count = u64::from(!first.is_empty());
        let mut block = first.into_bytes();
        while block.len() < BLOCK {
            let Ok(line) = self.lines.try_recv() else { break };
            count += u64::from(!line.is_empty());
            block.extend_from_slice(line.as_bytes());
        }
        (block, count)
    }

    fn open(&self) -> Option<Output> {
        match Output::open(&self.sink) {
            Ok(output) => {
                self.shared.set_problem(None);
                Some(output)
            }
            Err(error) => {
                self.shared.set_problem(Some(format!("cannot be opened: {error}")));
                None
            }
        }
    }

    fn fail(&self, lines: u64, error: Option<&io::Error>) {
        self.shared.failed.fetch_add(lines, Relaxed);
        if let Some(error) = error {
            self.shared.set_problem(Some(format!("cannot be written: {error}")));
        }
    }
}

impl Shared {
    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }
}

/// All logs: one for each file, however many load balancers write to it.
#[derive(Debug, Default)]
pub struct AccessLogs(Mutex<BTreeMap<LogSink, Running>>);

/// A log for as long as somebody uses it, and its writer.
type Running = (Weak<AccessLog>, JoinHandle<()>);

impl AccessLogs {
    /// The log of a sink. It is closed when its last user drops it. A file that cannot be opened is
    /// tried again until it can; its lines are dropped until then, see [`Self::problems`].
    ///
    /// # Errors
    /// If the system has no thread for it.
    pub fn get(&self, sink: &LogSink) -> io::Result<Arc<AccessLog>> {
        let mut logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = logs.get(sink).and_then(|(log, _)| log.upgrade()) {
            return Ok(log);
        }
        let (log, thread) = AccessLog::start(sink)?;
        let log = Arc::new(log);
        logs.insert(sink.clone(), (Arc::downgrade(&log), thread));
        Ok(log)
    }

    /// Which logs are not written now, and why.
    pub fn problems(&self) -> Vec<String> {
        let logs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let problem = |(sink, (log, _)): (&LogSink, &Running)| {
            let log = log.upgrade()?;
            let problem = log.shared.problem.lock().unwrap_or_else(PoisonError::into_inner);
            let path = match sink {
                LogSink::Stdout => "the standard output".to_owned(),
                LogSink::File(path) => path.display().to_string(),
            };
            Some(format!(
                "access log {path} {}; requests are served without it, it is tried again",
                problem.as_ref()?
            ))
        };
        logs.iter().filter_map(problem).collect()
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
        // The writer makes the file, in its own time.
        while fs::read_to_string(&path).unwrap_or_default().is_empty() && Instant::now() < end {
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

    fn wait_for(logs: &AccessLogs, is_it: impl Fn(&[String]) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_it(&logs.problems()) {
            assert!(Instant::now() < end, "{:?}", logs.problems());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_cannot_be_opened_is_told_and_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("later/log");
        let logs = AccessLogs::default();
        let log = logs.get(&LogSink::File(path.clone())).unwrap();
        let told = format!("access log {} cannot be opened: No such file", path.display());
        wait_for(&logs, |problems| matches!(problems, [it] if it.starts_with(&told)));
        log.write("lost\n".to_owned());
        let end = Instant::now() + PATIENCE;
        while log.dropped() == 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(log.dropped(), 1);
        fs::create_dir(path.parent().unwrap()).unwrap();
        wait_for(&logs, <[_]>::is_empty);
        log.write("written\n".to_owned());
        drop(log);
        assert!(logs.finish(PATIENCE));
        assert_eq!(fs::read_to_string(&path).unwrap(), "written\n");
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let logs = AccessLogs::default();
        let log = logs.get(&LogSink::File(path.clone())).unwrap();
        wait_for(&logs, |problems| problems.len() == 1);
        // Opening it for reading waits for a writer.
        let reader = std::thread::spawn(move || fs::read_to_string(path).unwrap());
        wait_for(&logs, <[_]>::is_empty);
        log.write("line\n".to_owned());
        drop(log);
        assert!(logs.finish(PATIENCE));
        assert_eq!(reader.join().unwrap(), "line\n");
    }
}
