//! Runs queries that a model wrote on a SQLite database, and compares their results. The queries
//! can only read, and their time and size are limited: a model writes `DROP TABLE`, joins without a
//! condition, and recursions without an end.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags};

use super::answer::FencedText;
use crate::{Error, Result};

/// Time limit of a query on a benchmark's database.
const FILE_TIME_LIMIT: Duration = Duration::from_secs(10);
/// A larger result is treated as a runaway join.
const MAX_ROWS: usize = 200_000;
const MAX_RESULT_BYTES: usize = 64 << 20;

/// The first statement of an answer: of its last fenced block, or else of its text.
fn extract_query(answer: &str) -> String {
    let FencedText { blocks, unfenced } = FencedText::read(answer);
    let block = blocks.into_iter().map(|block| block.content).rfind(|content| !content.trim().is_empty());
    let body = block.unwrap_or(unfenced);
    let mut quote = None;
    let end = body.char_indices().find(|&(_, c)| {
        match quote {
            Some(open) if c == open => quote = None,
            None if matches!(c, '\'' | '"' | '`') => quote = Some(c),
            _ => {}
        }
        quote.is_none() && c == ';'
    });
    body[..end.map_or(body.len(), |(at, _)| at)].trim().to_owned()
}

/// A database on which untrusted queries are safe to run.
pub(super) struct Database {
    connection: Connection,
    time_limit: Duration,
}

impl Database {
    /// Opens a file so that nothing is written, not even a journal beside it.
    ///
    /// # Errors
    /// When the file is not a database.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let bad = |error: rusqlite::Error| Error::file(path, format!("is not a readable SQLite database: {error}"));
        let name = path.to_string_lossy().replace('%', "%25").replace('?', "%3f").replace('#', "%23");
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(format!("file:{name}?mode=ro&immutable=1"), flags).map_err(bad)?;
        connection.query_row("SELECT COUNT(*) FROM sqlite_master", [], |_| Ok(())).map_err(bad)?;
        Self::guard(connection, FILE_TIME_LIMIT).map_err(bad)
    }

    /// Restricts a connection to reading. `time_limit` applies to each query.
    pub(super) fn guard(mut connection: Connection, time_limit: Duration) -> rusqlite::Result<Self> {
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

    /// Whether `answer` has the result of `reference`; `None` when the reference itself does not
    /// run. The order of the rows matters only if the reference specifies one.
    pub(super) fn same_result(&mut self, reference: &str, answer: &str) -> Option<bool> {
        let mut expected = self.rows(&extract_query(reference)).ok()?;
        let Ok(mut actual) = self.rows(&extract_query(answer)) else { return Some(false) };
        let words: Vec<String> = reference.split_whitespace().map(str::to_lowercase).collect();
        let is_ordered = words.windows(2).any(|pair| pair[0].ends_with("order") && pair[1].starts_with("by"));
        if !is_ordered {
            expected.sort();
            actual.sort();
        }
        Some(expected == actual)
    }

    /// The rows of a query's result, with each value in its canonical text.
    fn rows(&mut self, query: &str) -> rusqlite::Result<Vec<Vec<String>>> {
        let deadline = Instant::now() + self.time_limit;
        self.connection.progress_handler(10_000, Some(move || Instant::now() > deadline))?;
        let mut statement = self.connection.prepare(query)?;
        let columns = statement.column_count();
        if columns == 0 || !statement.readonly() {
            return Err(rusqlite::Error::InvalidQuery);
        }
        let mut result = statement.query([])?;
        let (mut rows, mut bytes) = (Vec::new(), 0);
        while let Some(row) = result.next()? {
            let values = (0..columns)
                .map(|column| row.get_ref(column).map(canonical_text))
                .collect::<rusqlite::Result<Vec<String>>>()?;
            bytes += values.iter().map(String::len).sum::<usize>();
            rows.push(values);
            if rows.len() > MAX_ROWS || bytes > MAX_RESULT_BYTES {
                return Err(rusqlite::Error::InvalidQuery);
            }
        }
        Ok(rows)
    }
}

/// A text that is equal for values that count as equal: 1 and 1.0, or averages that differ by
/// rounding. Text values need not be UTF-8.
fn canonical_text(value: ValueRef<'_>) -> String {
    match value {
        ValueRef::Null => "null".to_owned(),
        ValueRef::Integer(number) => format!("n{number}"),
        ValueRef::Real(number) if number.fract() == 0.0 && number.abs() < 1e15 => format!("n{}", number as i64),
        ValueRef::Real(number) => {
            let rounded: f64 = format!("{number:.9e}").parse().unwrap_or(number);
            if rounded.fract() == 0.0 && rounded.abs() < 1e15 {
                format!("n{}", rounded as i64)
            } else {
                format!("n{rounded}")
            }
        }
        ValueRef::Text(bytes) => format!("t{}", String::from_utf8_lossy(bytes)),
        ValueRef::Blob(bytes) => format!("b{bytes:?}"),
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
    fn results_are_compared_not_queries() {
        let (_dir, path) = shop();
        let mut database = Database::open(&path).unwrap();
        let mut same = |gold: &str, answer: &str| database.same_result(gold, answer);
        let all = "SELECT name FROM item";
        assert_eq!(same(all, "```sql\nselect name from item order by price desc;\n```"), Some(true));
        assert_eq!(
            same("SELECT name FROM item ORDER  BY price", "SELECT name FROM item ORDER BY price DESC"),
            Some(false)
        );
        assert_eq!(same("SELECT 1", "SELECT 1.0"), Some(true));
        assert_eq!(same("SELECT 1", "SELECT '1'"), Some(false));
        assert_eq!(same(all, "SELECT DISTINCT name FROM item UNION ALL SELECT 'a'"), Some(false), "a multiset");
        assert_eq!(same("SELECT nothing FROM item", all), None);
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
            assert_eq!(database.same_result("SELECT name FROM item", answer), Some(false), "{answer}");
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
            assert_eq!(limited().same_result("SELECT 1", answer), Some(false), "{answer}");
        }
        assert_eq!(limited().same_result("SELECT 1", "SELECT length(zeroblob(1000000)) / 1000000"), Some(true));
    }

    #[test]
    fn the_first_statement_is_extracted() {
        assert_eq!(extract_query("SELECT ';' FROM t; DROP TABLE t"), "SELECT ';' FROM t");
        assert_eq!(extract_query("Here it is:\n```sqlite\nSELECT 1;\n```\nDone."), "SELECT 1");
        assert_eq!(extract_query("```\nSELECT 2\n```"), "SELECT 2");
    }
}
