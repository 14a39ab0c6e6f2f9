//! The databases that queries of a model run on, open in a process of their own, which is killed when
//! a query takes too long or too much memory.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use cllm_launcher::{DatabaseSource, LaunchOrder, QueryLimits, QueryReply, QueryRequest};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use super::rewrite::is_ordered;
use crate::sandbox::LauncherFile;
use crate::{Error, Result, interrupt};

/// Time limit of a query on a benchmark's database, which is that of Spider's official judge.
const FILE_TIME_LIMIT: Duration = Duration::from_secs(60);
/// What a query may take beyond its time limit, which it notices by itself unless one step of SQLite
/// is longer.
const GRACE: Duration = Duration::from_secs(2);
/// How often the clock and signals are checked.
const POLL_MILLISECONDS: u16 = 50;
const MEMORY_BYTES: u64 = 2 << 30;
const MAX_ROWS: usize = 2_000_000;

/// Databases on which untrusted queries are safe to run.
pub(in crate::task) struct Databases {
    sources: Vec<DatabaseSource>,
    limits: QueryLimits,
    /// `None` after a query that ended it. The next query starts another.
    process: RefCell<Option<Process>>,
}

impl Databases {
    /// Opens files. Nothing is written, not even a journal beside them.
    ///
    /// # Errors
    /// When a file is not a database, or no process can be started.
    pub(in crate::task) fn open(paths: &[impl AsRef<Path>]) -> Result<Self> {
        let source = |path: &_| DatabaseSource::File(AsRef::<Path>::as_ref(path).to_string_lossy().into_owned());
        Self::start(paths.iter().map(source).collect(), FILE_TIME_LIMIT)
    }

    /// Makes databases in memory, each by its statements. `time_limit` applies to each query.
    ///
    /// # Errors
    /// When no process can be started.
    pub(in crate::task) fn from_scripts(scripts: Vec<String>, time_limit: Duration) -> Result<Self> {
        Self::start(scripts.into_iter().map(DatabaseSource::Script).collect(), time_limit)
    }

    fn start(sources: Vec<DatabaseSource>, time_limit: Duration) -> Result<Self> {
        let limits = QueryLimits { time: time_limit, memory_bytes: MEMORY_BYTES, max_rows: MAX_ROWS };
        let process = RefCell::new(Some(Process::start(&sources, &limits)?));
        Ok(Databases { sources, limits, process })
    }

    /// Whether SQLite can run the query, and it only reads.
    pub(super) fn accepts(&self, database: usize, query: &str) -> Result<bool> {
        let request = QueryRequest::Accepts { database, query: query.to_owned() };
        Ok(self.ask(&request)?.unwrap_or(false))
    }

    /// Whether `answer` has the result of `reference`; `None` when the reference itself does not
    /// run.
    pub(super) fn same_result(&self, database: usize, reference: &str, answer: Option<&str>) -> Result<Option<bool>> {
        let expect = QueryRequest::Expect { database, query: reference.to_owned() };
        if self.ask(&expect)? != Some(true) {
            return Ok(None);
        }
        let Some(answer) = answer else { return Ok(Some(false)) };
        let matches = QueryRequest::Matches { query: answer.to_owned(), is_ordered: is_ordered(reference) };
        Ok(Some(self.ask(&matches)?.unwrap_or(false)))
    }

    /// `None` if the request ended the process or took too long.
    fn ask(&self, request: &QueryRequest) -> Result<Option<bool>> {
        let mut process = match self.process.take() {
            Some(process) => process,
            None => Process::start(&self.sources, &self.limits)?,
        };
        let Some(QueryReply::Answer(answer)) = process.ask(request, self.limits.time + GRACE)? else { return Ok(None) };
        self.process.replace(Some(process));
        Ok(Some(answer))
    }
}

/// A process of the launcher that runs queries.
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
}

impl Process {
    fn start(sources: &Vec<DatabaseSource>, limits: &QueryLimits) -> Result<Self> {
        let failed = |why: &str| Error::environment(format!("the process that runs queries cannot be started: {why}"));
        let order = serde_json::to_string(&LaunchOrder::Queries(limits.clone())).map_err(Error::serialization)?;
        let mut child = Command::new(LauncherFile::shared()?.path())
            .arg(order)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // A signal from the terminal is for this program alone, which ends the process itself.
            .process_group(0)
            .spawn()
            .map_err(|error| failed(&error.to_string()))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("it has no pipes"));
        };
        let mut process = Process { child, stdin, stdout };
        match process.ask(sources, limits.time + GRACE)? {
            Some(QueryReply::Answer(_)) => Ok(process),
            Some(QueryReply::BadDatabase { index, problem }) => Err(bad_database(&sources[index], &problem)),
            Some(QueryReply::Problem(problem)) => Err(failed(&problem)),
            None => Err(failed("it ended at once")),
        }
    }

    /// Sends a line and reads the one that answers it; `None` if the process ends or is late.
    fn ask(&mut self, request: &impl Serialize, limit: Duration) -> Result<Option<QueryReply>> {
        let line = serde_json::to_string(request).map_err(Error::serialization)? + "\n";
        let deadline = Instant::now() + limit;
        if self.stdin.write_all(line.as_bytes()).is_err() {
            interrupt::check()?;
            return Ok(None);
        }
        let mut reply = Vec::new();
        while !reply.ends_with(b"\n") {
            interrupt::check()?;
            if Instant::now() > deadline {
                return Ok(None);
            }
            let mut polled = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, PollTimeout::from(POLL_MILLISECONDS)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(Error::environment(format!("queries cannot be watched: {error}"))),
            }
            let mut buffer = [0; 4096];
            match self.stdout.read(&mut buffer) {
                // What interrupts this program may have ended the process too.
                Ok(0) | Err(_) => return interrupt::check().map(|()| None),
                Ok(count) => reply.extend_from_slice(&buffer[..count]),
            }
        }
        Ok(serde_json::from_slice(&reply).ok())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn bad_database(source: &DatabaseSource, problem: &str) -> Error {
    match source {
        DatabaseSource::File(path) => Error::file(path, format!("is not a readable SQLite database: {problem}")),
        DatabaseSource::Script(_) => Error::environment(format!("SQLite: {problem}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shop() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shop.sqlite");
        let database = rusqlite::Connection::open(&path).unwrap();
        database
            .execute_batch(
                "CREATE TABLE item (name TEXT, price REAL);
                 INSERT INTO item VALUES ('a', 1.0), ('b', 2.5), (CAST(x'ff41' AS TEXT), 3);",
            )
            .unwrap();
        (dir, path)
    }

    #[test]
    fn harmful_and_invalid_queries_are_incorrect_and_change_nothing() {
        let (dir, path) = shop();
        let before = std::fs::read(&path).unwrap();
        let attach = format!("ATTACH '{}' AS other", dir.path().join("other").display());
        let copy = format!("VACUUM INTO '{}'", dir.path().join("copy").display());
        let runaway_join = "SELECT a.name FROM item a, item b, item c, item d, item e, item f, item g, item h, item i, item j, \
                    item k, item l";
        let databases = Databases::open(&[&path]).unwrap();
        for answer in [
            "",
            "hello",
            "DROP TABLE item",
            "DELETE FROM item",
            "UPDATE item SET price = 0 RETURNING name",
            "WITH new AS (SELECT 1) INSERT INTO item SELECT 'd', 4 FROM new",
            "CREATE TEMP TABLE new AS SELECT name FROM item",
            "BEGIN EXCLUSIVE",
            "PRAGMA journal_mode = wal",
            "PRAGMA writable_schema = on",
            "SELECT load_extension('item')",
            "SELECT writefile('new', 'x')",
            &attach,
            &copy,
            runaway_join,
        ] {
            let same = databases.same_result(0, "SELECT name FROM item", Some(answer)).unwrap();
            assert_eq!(same, Some(false), "{answer}");
        }
        let same = databases.same_result(0, "SELECT name FROM item", Some("SELECT name FROM item")).unwrap();
        assert_eq!(same, Some(true));
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let refusal = Databases::open(&[dir.path().join("none.sqlite")]).err().unwrap().to_string();
        assert!(refusal.contains("none.sqlite: is not a readable SQLite database"), "{refusal}");
    }

    #[test]
    fn endless_and_oversized_queries_are_stopped() {
        let (_dir, path) = shop();
        let source = DatabaseSource::File(path.to_string_lossy().into_owned());
        let databases = Databases::start(vec![source], Duration::from_millis(200)).unwrap();
        let same = |reference: &str, answer: &str| databases.same_result(0, reference, Some(answer)).unwrap();
        let endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)";
        let ten = "WITH n(x) AS (VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9))";
        let wide = vec!["zeroblob(16000000)"; 1900].join(", ");
        for answer in [
            &format!("{endless} SELECT count(*) FROM n"),
            &format!("{endless} SELECT x FROM n ORDER BY -x"),
            &format!("{endless} SELECT x FROM n"),
            &format!("{endless} SELECT group_concat(x) FROM n"),
            // 1 GB of different values.
            &format!("{ten} SELECT zeroblob(1000000 + a.x * 100 + b.x * 10 + c.x) FROM n a, n b, n c"),
            &format!("{endless} SELECT hex(zeroblob(1000000)), x FROM n ORDER BY 1, -x"),
            "SELECT zeroblob(1000000000)",
            "SELECT hex(hex(hex(zeroblob(10000000))))",
            "SELECT printf('%1000000000d', 1)",
            "SELECT replace(hex(zeroblob(100000)), '0', hex(zeroblob(100000)))",
            // One step of SQLite that takes minutes.
            "SELECT instr(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || '1')",
            // One row of 30 GB.
            &format!("SELECT {wide}"),
        ] {
            assert_eq!(same("SELECT 1", answer), Some(false), "{answer:.100}");
            // A reference that is stopped says nothing about the answer.
            assert_eq!(same(answer, "SELECT 1"), None, "{answer:.100}");
        }
        assert_eq!(same("SELECT 1", "SELECT length(zeroblob(1000000)) / 1000000"), Some(true));
        // As many rows as the reference has, but too large to hold.
        let large = format!("{ten} SELECT a.x || b.x || hex(zeroblob(8000000)) FROM n a, n b");
        assert_eq!(same(&format!("{ten} SELECT 1 FROM n a, n b"), &large), Some(false));
    }
}
