//! Runs queries that a model wrote on SQLite databases, in a process that can be killed: a single
//! step of SQLite may take longer or need more memory than any of its own limits says.

mod database;
mod result;

use std::io::{BufRead, Write};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::Resource;
use nix::sys::signal::Signal;

use crate::protocol::{DatabaseSource, Problem, QueryLimits, QueryReply, QueryRequest};
use crate::{file_rules, limits, system_calls};
use database::Database;
use result::{ResultTable, ValueIds};

/// Reads the databases' sources and then requests from stdin, a line each, and writes a line for each
/// to stdout.
pub(super) fn serve(limits: &QueryLimits) -> Result<(), Problem> {
    restrict_resources(limits)?;
    let mut lines = std::io::stdin().lock().lines();
    let mut next = || lines.next().transpose().map_err(|error| error.to_string());
    let Some(sources) = next()? else { return Ok(()) };
    let mut server = match Server::open(&parse::<Vec<DatabaseSource>>(&sources)?, limits) {
        Ok(server) => server,
        Err(refusal) => return reply(&refusal),
    };
    // All files are open. Queries need no layer of the sandbox to be safe, so each applies where the
    // kernel has it.
    let _ = file_rules::apply(&[], None);
    let _ = system_calls::restrict();
    reply(&QueryReply::Answer(true))?;
    while let Some(request) = next()? {
        let answer = server.answer(parse(&request)?, limits);
        reply(&QueryReply::Answer(answer))?;
    }
    Ok(())
}

/// It needs no files to write to: what SQLite sorts stays in memory.
fn restrict_resources(limits: &QueryLimits) -> Result<(), Problem> {
    let fate = set_pdeathsig(Signal::SIGKILL);
    fate.map_err(|error| format!("the launcher cannot end with the program that started it: {error}"))?;
    limits::set_limit(Resource::RLIMIT_CORE, 0)?;
    limits::set_limit(Resource::RLIMIT_FSIZE, 0)?;
    limits::set_limit(Resource::RLIMIT_AS, limits.memory_bytes)
}

fn parse<T: serde::de::DeserializeOwned>(line: &str) -> Result<T, Problem> {
    serde_json::from_str(line).map_err(|error| format!("the launcher has no valid request: {error}"))
}

pub(super) fn reply(reply: &QueryReply) -> Result<(), Problem> {
    let mut text = serde_json::to_string(reply).map_err(|error| error.to_string())?;
    text.push('\n');
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| error.to_string())
}

/// The open databases, and the result that the next query is compared with.
struct Server {
    databases: Vec<Database>,
    expected: Option<Expected>,
}

struct Expected {
    database: usize,
    table: ResultTable,
    ids: ValueIds,
}

impl Server {
    fn open(sources: &[DatabaseSource], limits: &QueryLimits) -> Result<Self, QueryReply> {
        let open = |(index, source)| {
            Database::open(source, limits)
                .map_err(|error| QueryReply::BadDatabase { index, problem: error.to_string() })
        };
        let databases = sources.iter().enumerate().map(open).collect::<Result<_, _>>()?;
        Ok(Server { databases, expected: None })
    }

    fn answer(&mut self, request: QueryRequest, limits: &QueryLimits) -> bool {
        match request {
            QueryRequest::Accepts { database, query } => {
                self.databases.get(database).is_some_and(|database| database.accepts(&query))
            }
            QueryRequest::Expect { database, query } => {
                let mut ids = ValueIds::default();
                let result = self.databases.get_mut(database).map(|open| open.run(&query, &mut ids, limits.max_rows));
                self.expected = result.and_then(Result::ok).map(|table| Expected { database, table, ids });
                self.expected.is_some()
            }
            QueryRequest::Matches { query, is_ordered } => {
                let Some(Expected { database, table, ids }) = &mut self.expected else { return false };
                // More rows than the reference has are another result, and a runaway join has no end.
                let result = self.databases[*database].run(&query, ids, table.num_rows());
                result.is_ok_and(|result| table.is_equal(&result, is_ordered))
            }
        }
    }
}
