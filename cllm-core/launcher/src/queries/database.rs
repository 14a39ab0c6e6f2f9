//! A SQLite database on which untrusted queries are safe to run. They can only read, and their time
//! and size are limited: a model writes `DROP TABLE`, joins without a condition, and recursions
//! without an end.

use std::time::{Duration, Instant};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::limits::Limit;
use rusqlite::{Connection, OpenFlags, Statement};

use super::result::{ResultTable, ValueIds};
use crate::protocol::{DatabaseSource, QueryLimits};

/// Maximum bytes of a value or row.
const MAX_VALUE_BYTES: i32 = 16 << 20;

pub(super) struct Database {
    connection: Connection,
    time_limit: Duration,
}

impl Database {
    /// Opens a database so that nothing is written, not even a journal beside it.
    ///
    /// # Errors
    /// When it is not a database.
    pub(super) fn open(source: &DatabaseSource, limits: &QueryLimits) -> rusqlite::Result<Self> {
        let connection = match source {
            DatabaseSource::File(path) => {
                let name = path.replace('%', "%25").replace('?', "%3f").replace('#', "%23");
                let flags =
                    OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                Connection::open_with_flags(format!("file:{name}?mode=ro&immutable=1"), flags)?
            }
            DatabaseSource::Script(script) => {
                let connection = Connection::open_in_memory()?;
                connection.execute_batch(script)?;
                connection
            }
        };
        connection.query_row("SELECT COUNT(*) FROM sqlite_master", [], |_| Ok(()))?;
        let heap_bytes = limits.memory_bytes / 2;
        connection.execute_batch(&format!("PRAGMA temp_store = MEMORY; PRAGMA hard_heap_limit = {heap_bytes}"))?;
        Self::guard(connection, limits.time)
    }

    /// Restricts a connection to reading. `time_limit` applies to each query.
    fn guard(mut connection: Connection, time_limit: Duration) -> rusqlite::Result<Self> {
        for (limit, max) in [
            (Limit::SQLITE_LIMIT_ATTACHED, 0),
            (Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
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

    fn prepare(&self, query: &str) -> rusqlite::Result<Statement<'_>> {
        let statement = self.connection.prepare(query)?;
        let is_query = statement.column_count() > 0 && statement.readonly();
        if is_query { Ok(statement) } else { Err(rusqlite::Error::InvalidQuery) }
    }

    /// The result of a query.
    pub(super) fn run(&mut self, query: &str, ids: &mut ValueIds, max_rows: usize) -> rusqlite::Result<ResultTable> {
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
