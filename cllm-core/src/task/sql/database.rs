//! Runs queries that a model wrote on a SQLite database. The queries can only read, and their time
//! and size are limited: a model writes `DROP TABLE`, joins without a condition, and recursions
//! without an end.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::{Connection, OpenFlags, Statement};

use super::result::{ResultTable, ValueIds};
use super::rewrite::is_ordered;
use crate::{Error, Result};

/// Time limit of a query on a benchmark's database, which is that of Spider's official judge.
const FILE_TIME_LIMIT: Duration = Duration::from_secs(60);
/// A reference with more rows is not run to its end.
const MAX_ROWS: usize = 2_000_000;

/// A database on which untrusted queries are safe to run.
pub(in crate::task) struct Database {
    connection: Connection,
    time_limit: Duration,
}

impl Database {
    /// Opens a file so that nothing is written, not even a journal beside it.
    ///
    /// # Errors
    /// When the file is not a database.
    pub(in crate::task) fn open(path: &Path) -> Result<Self> {
        let bad = |error: rusqlite::Error| Error::file(path, format!("is not a readable SQLite database: {error}"));
        let name = path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(format!("file:{name}?mode=ro&immutable=1"), flags).map_err(bad)?;
        connection.query_row("SELECT COUNT(*) FROM sqlite_master", [], |_| Ok(())).map_err(bad)?;
        Self::guard(connection, FILE_TIME_LIMIT).map_err(bad)
    }

    /// Restricts a connection to reading. `time_limit` applies to each query.
    pub(in crate::task) fn guard(mut connection: Connection, time_limit: Duration) -> rusqlite::Result<Self> {
        for (limit, max) in [
            (Limit::SQLITE_LIMIT_ATTACHED, 0),
            (Limit::SQLITE_LIMIT_LENGTH, 16 << 20),
            (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
        ] {
            connection.set_limit(limit, max)?;
        }
        let authorize = |context: AuthContext<'_>| match context.action {
            AuthAction::Select | AuthAction::Read { .. } | AuthAction::Function { .. } | AuthAction::Recursive => {
                Authorization::Allow
            }
            _ => Authorization::Deny,
        };
        connection.authorizer(Some(authorize))?;
        Ok(Database { connection, time_limit })
    }

    /// Whether SQLite can run the query, and it only reads.
    pub(super) fn accepts(&self, query: &str) -> bool {
        self.prepare(query).is_ok()
    }

    /// Whether `answer` has the result of `reference`; `None` when the reference itself does not
    /// run.
    pub(super) fn same_result(&mut self, reference: &str, answer: Option<&str>) -> Option<bool> {
        let mut ids = ValueIds::default();
        let expected = self.run(reference, &mut ids, MAX_ROWS).ok()?;
        // More rows than the reference has are another result, and a runaway join has no end.
        let actual = answer.map(|answer| self.run(answer, &mut ids, expected.num_rows()));
        Some(actual.is_some_and(|actual| actual.is_ok_and(|actual| expected.is_equal(&actual, is_ordered(reference)))))
    }

    fn prepare(&self, query: &str) -> rusqlite::Result<Statement<'_>> {
        let statement = self.connection.prepare(query)?;
        let is_query = statement.column_count() > 0 && statement.readonly();
        if is_query { Ok(statement) } else { Err(rusqlite::Error::InvalidQuery) }
    }

    /// The result of a query.
    fn run(&mut self, query: &str, ids: &mut ValueIds, max_rows: usize) -> rusqlite::Result<ResultTable> {
        let deadline = Instant::now() + self.time_limit;
        self.connection.progress_handler(10_000, Some(move || Instant::now() > deadline))?;
        let mut statement = self.prepare(query)?;
        let mut table = ResultTable::new(statement.column_count());
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            if table.num_rows() == max_rows {
                return Err(rusqlite::Error::InvalidQuery);
            }
            table.push_row(row, ids)?;
        }
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shop() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shop.sqlite");
        let database = Connection::open(&path).unwrap();
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
            let mut database = Database::open(&path).unwrap();
            assert_eq!(database.same_result("SELECT name FROM item", Some(answer)), Some(false), "{answer}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(Database::open(&dir.path().join("none.sqlite")).is_err());
    }

    #[test]
    fn endless_and_oversized_queries_are_stopped() {
        let (_dir, path) = shop();
        let limited = || Database::guard(Connection::open(&path).unwrap(), Duration::from_millis(200)).unwrap();
        let endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)";
        let ten = "WITH n(x) AS (VALUES (0), (1), (2), (3), (4), (5), (6), (7), (8), (9))";
        for answer in [
            &format!("{endless} SELECT count(*) FROM n"),
            &format!("{endless} SELECT x FROM n ORDER BY -x"),
            &format!("{endless} SELECT x FROM n"),
            &format!("{endless} SELECT group_concat(x) FROM n"),
            &format!("{ten} SELECT zeroblob(1000000) FROM n a, n b, n c"),
            "SELECT zeroblob(1000000000)",
            "SELECT hex(hex(hex(zeroblob(10000000))))",
            "SELECT printf('%1000000000d', 1)",
            "SELECT replace(hex(zeroblob(100000)), '0', hex(zeroblob(100000)))",
        ] {
            assert_eq!(limited().same_result("SELECT 1", Some(answer)), Some(false), "{answer}");
        }
        assert_eq!(limited().same_result("SELECT 1", Some("SELECT length(zeroblob(1000000)) / 1000000")), Some(true));
        // As many rows as the reference has, but too large to hold.
        let large = format!("{ten} SELECT a.x || b.x || hex(zeroblob(8000000)) FROM n a, n b");
        assert_eq!(limited().same_result(&format!("{ten} SELECT 1 FROM n a, n b"), Some(&large)), Some(false));
    }
}
