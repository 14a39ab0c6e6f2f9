//! Ends all processes of a run when one of them fails, with its message.
//!
//! A process whose peer is gone may wait in a collective for ever, and one that validates or writes
//! a checkpoint lets the others wait for a long time: the collectives tell neither from the other.
//! So a thread of each process shows at the store once a second that the process lives, and looks
//! there for the failure of another. Each also looks whether the process of the rank before its own
//! still lives, so that a process that was killed is noticed too.

use std::fmt::Display;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use signal_hook::low_level;

use super::{ProcessEnv, START_POLL, START_TIMEOUT};
use crate::cuda::store::Store;
use crate::{Error, Result, interrupt, progress};

/// How often a process shows that it lives.
const BEAT: Duration = Duration::from_secs(1);
/// A process that has shown nothing for so long is dead, or its machine is.
const SILENCE: Duration = Duration::from_secs(20);
/// After a collective has failed, some process is dead: the one that shows nothing for so long.
const SILENCE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// How long the process that serves the store waits at its end for the others to read from it.
const LINGER: Duration = Duration::from_secs(20);
/// How long a process that is done waits for the others, which may still write a model.
const END_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

// Keys of the store.
const FAILURE: &str = "failure";
const NUM_FAILURES: &str = "num_failures";
const NUM_STARTED: &str = "num_started";
const ALL_STARTED: &str = "all_started";
const NUM_DONE: &str = "num_done";
const ALL_DONE: &str = "all_done";
const NUM_LEFT: &str = "num_left";
const ALL_LEFT: &str = "all_left";

/// Why the run ends: the first failure of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Failure {
    rank: usize,
    exit_code: u8,
    message: String,
    /// Whether the process was found dead, rather than saying so itself.
    is_silent: bool,
}

/// The connection of a process to the others.
struct Peers {
    store: Store,
    rank: usize,
    world_size: usize,
    /// Whether this process serves the store.
    serves: bool,
}

/// Runs `body`, the part of one process in a run of several. If it fails in one of them, all end
/// within a minute with the message and the exit code of that one, as they do if one is killed. A
/// process that is done waits for the others.
///
/// `body` returns its panics as errors. It may be cut off at any moment, as by a kill.
///
/// # Errors
/// Those of the body; [`Error::Usage`] if the others cannot be reached; [`Error::Peer`] for the
/// failure of another process. It is also the last message of processes that end in a collective.
pub fn run_together<T>(process: &ProcessEnv, body: impl FnOnce() -> Result<T>) -> Result<T> {
    process.wait_for_store(START_TIMEOUT)?;
    let peers = Peers::connect(process, process.rendezvous.serves)?;
    let watcher = Watcher::start(Peers::connect(process, false)?);
    let result = peers.wait_for_start().and_then(|()| body()).map_err(|error| match error {
        Error::Peer { .. } => peers.cause().unwrap_or(error),
        own => own,
    });
    match &result {
        Ok(_) => {
            peers.wait_for_all()?;
            watcher.stop();
        }
        Err(error) => {
            let failure = Failure {
                rank: peers.rank,
                exit_code: error.exit_code(),
                message: error.to_string(),
                is_silent: false,
            };
            // First, since it would take this process's own failure for that of another.
            watcher.stop_after(&failure);
            let _ = peers.publish(&failure);
        }
    }
    peers.leave();
    result
}

impl Peers {
    /// Connects to the store, and begins to serve it if `begins_to_serve`.
    fn connect(process: &ProcessEnv, begins_to_serve: bool) -> Result<Self> {
        let store = process.connect(begins_to_serve)?;
        Ok(Peers { store, rank: process.rank, world_size: process.world_size, serves: process.rendezvous.serves })
    }

    /// Makes `failure` the one that ends the run, unless there is one already.
    fn publish(&self, failure: &Failure) -> Result<()> {
        if self.store.add(NUM_FAILURES, 1)? == 1 {
            self.store.set(FAILURE, &serde_json::to_string(failure).map_err(Error::serialization)?)?;
        }
        Ok(())
    }

    fn failure(&self) -> Result<Option<Failure>> {
        let json = self.store.get(FAILURE)?;
        json.map(|json| serde_json::from_str(&json).map_err(Error::serialization)).transpose()
    }

    fn error_of(&self, failure: &Failure) -> Error {
        let Failure { rank, exit_code, message, .. } = failure;
        Error::Peer {
            exit_code: *exit_code,
            message: format!("process {rank} of {} failed: {message}", self.world_size),
        }
    }

    fn lost(&self, error: &Error) -> Error {
        lost_store(self.world_size, error)
    }

    /// The failure of another process that made a collective fail in this one; `None` if all of
    /// them live.
    fn cause(&self) -> Option<Error> {
        let failure = self.failure_of_any();
        failure.map_or_else(|error| Some(self.lost(&error)), |failure| failure.map(|failure| self.error_of(&failure)))
    }

    fn failure_of_any(&self) -> Result<Option<Failure>> {
        let beats = || (0..self.world_size).map(|rank| self.beat_of(rank)).collect::<Result<Vec<_>>>();
        let before = beats()?;
        // This returns early if a process says why it failed.
        if self.store.wait(FAILURE, SILENCE_AFTER_FAILURE).is_err() {
            let after = beats()?;
            if let Some(rank) = (0..self.world_size).find(|&rank| before[rank] == after[rank]) {
                self.publish(&silent(rank, before[rank].is_some()))?;
                // If another process came first, it may still be about to write.
                let _ = self.store.wait(FAILURE, SILENCE_AFTER_FAILURE);
            }
        }
        self.failure()
    }

    /// What process `rank` showed last; `None` before its start.
    fn beat_of(&self, rank: usize) -> Result<Option<String>> {
        self.store.get(&beat_key(rank))
    }

    /// Waits until every process has started. The watcher ends this one if another does not, or fails
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Interrupted`], also if the others never start.
    fn wait_for_start(&self) -> Result<()> {
        let lost = |error| self.lost(&error);
        if self.store.add(NUM_STARTED, 1).map_err(lost)? == self.world_size as i64 {
            self.store.set(ALL_STARTED, "").map_err(lost)?;
        }
        while self.store.get(ALL_STARTED).map_err(lost)?.is_none() {
            interrupt::check()?;
            thread::sleep(START_POLL);
        }
        Ok(())
    }

    /// Waits until every process is done. If one fails meanwhile, the watcher ends this one.
    fn wait_for_all(&self) -> Result<()> {
        let wait = || {
            if self.store.add(NUM_DONE, 1)? == self.world_size as i64 {
                self.store.set(ALL_DONE, "")?;
            }
            self.store.wait(ALL_DONE, END_TIMEOUT)
        };
        wait().map_err(|error| self.lost(&error))
    }

    /// The last thing that a process does here. The one that serves the store waits for the others,
    /// which may still have to read from it; whether they come or not, it ends.
    fn leave(&self) {
        let leave = || {
            let num_silent = self.failure()?.map_or(0, |failure| i64::from(failure.is_silent));
            // One that has not started is not waited for: it may never come.
            let num_leaving = self.store.add(NUM_STARTED, 0)? - 1 - num_silent;
            if self.serves && num_leaving > 0 {
                return self.store.wait(ALL_LEFT, LINGER);
            }
            if !self.serves && self.store.add(NUM_LEFT, 1)? >= num_leaving {
                self.store.set(ALL_LEFT, "")?;
            }
            Ok(())
        };
        let _ = leave();
    }
}

fn beat_key(rank: usize) -> String {
    format!("beat_{rank}")
}

/// The failure of a process that does not say why it failed.
fn silent(rank: usize, has_started: bool) -> Failure {
    let message = match has_started {
        true => {
            "it ended without a message: the system killed it (if memory ran out), or its machine is down".to_owned()
        }
        false => format!("it did not start within {} minutes", START_TIMEOUT.as_secs() / 60),
    };
    Failure { rank, exit_code: 3, message, is_silent: true }
}

/// The error for a store that does not answer.
fn lost_store(world_size: usize, problem: impl Display) -> Error {
    let message = format!(
        "process 0 of {world_size} failed: it (or the launcher, where that serves the store) ended without a message or \
         cannot be reached: {problem}"
    );
    Error::Peer { exit_code: 3, message }
}

/// The threads that watch over the other processes and end this one if another fails. There are two
/// because the one that asks the store waits for ever if the machine of the store is down.
struct Watcher {
    stop: Sender<()>,
    /// The failure of this process, if there is one.
    own_failure: Arc<OnceLock<(String, u8)>>,
    supervisor: JoinHandle<()>,
}

impl Watcher {
    fn start(peers: Peers) -> Self {
        let (stop, stopped) = channel();
        let (sender, reports) = channel();
        let world_size = peers.world_size;
        let own_failure = Arc::new(OnceLock::new());
        let known_failure = Arc::clone(&own_failure);
        thread::spawn(move || Watch::new(peers, Instant::now()).run(&stopped, &sender));
        let supervisor = thread::spawn(move || supervise(&reports, world_size, &known_failure));
        Watcher { stop, own_failure, supervisor }
    }

    /// As [`Self::stop`], when this process has failed. If the store no longer answers, the process
    /// ends here, with its own message.
    fn stop_after(self, failure: &Failure) {
        let _ = self.own_failure.set((failure.message.clone(), failure.exit_code));
        self.stop();
    }

    /// Ends both threads. From then on, the failure of another process does not end this one.
    fn stop(self) {
        drop(self.stop);
        let _ = self.supervisor.join();
    }
}

/// Ends this process with the first error that is reported, or if no report comes. Other threads
/// may be anywhere: a main thread that waits in a collective cannot be woken up.
fn supervise(reports: &Receiver<Option<Error>>, world_size: usize, own_failure: &OnceLock<(String, u8)>) {
    let Some((message, exit_code)) = last_words(reports, world_size, own_failure, SILENCE) else { return };
    progress::log_error(message);
    // Until the watching thread is done: the others may still have to read from the store.
    let _ = reports.recv_timeout(LINGER);
    low_level::exit(exit_code.into());
}

/// Waits for the reason to end this process: its message and exit code. `None` if the watching
/// thread is told to stop first. A failure of this process matters more than what comes after it.
fn last_words(
    reports: &Receiver<Option<Error>>,
    world_size: usize,
    own_failure: &OnceLock<(String, u8)>,
    silence: Duration,
) -> Option<(String, u8)> {
    let error = loop {
        match reports.recv_timeout(silence) {
            Ok(None) => {}
            Ok(Some(error)) => break error,
            Err(RecvTimeoutError::Timeout) => break lost_store(world_size, "it does not answer"),
            Err(RecvTimeoutError::Disconnected) => return None,
        }
    };
    Some(own_failure.get().cloned().unwrap_or_else(|| (error.to_string(), error.exit_code())))
}

/// Shows that this process lives, and looks for failures of others.
struct Watch {
    peers: Peers,
    num_beats: u64,
    /// The rank before that of this process, what it showed last, and since when.
    neighbor: usize,
    neighbor_beat: Option<String>,
    since: Instant,
}

impl Watch {
    fn new(peers: Peers, now: Instant) -> Self {
        let neighbor = (peers.rank + peers.world_size - 1) % peers.world_size;
        Watch { peers, num_beats: 0, neighbor, neighbor_beat: None, since: now }
    }

    /// Beats until `stopped` is closed, or until this process has to end.
    fn run(mut self, stopped: &Receiver<()>, reports: &Sender<Option<Error>>) {
        loop {
            let error = self.beat(Instant::now()).unwrap_or_else(|error| Some(self.peers.lost(&error)));
            let is_over = error.is_some();
            let _ = reports.send(error);
            if is_over {
                return self.peers.leave();
            }
            if stopped.recv_timeout(BEAT) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    /// Returns the error that ends this process, if there is one.
    fn beat(&mut self, now: Instant) -> Result<Option<Error>> {
        self.num_beats += 1;
        self.peers.store.set(&beat_key(self.peers.rank), &self.num_beats.to_string())?;
        let neighbor_beat = self.peers.beat_of(self.neighbor)?;
        if neighbor_beat != self.neighbor_beat {
            (self.neighbor_beat, self.since) = (neighbor_beat, now);
        }
        let max_silence = if self.neighbor_beat.is_some() { SILENCE } else { START_TIMEOUT };
        if now - self.since > max_silence {
            self.peers.publish(&silent(self.neighbor, self.neighbor_beat.is_some()))?;
        }
        Ok(self.peers.failure()?.map(|failure| self.peers.error_of(&failure)))
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::cuda::store::Rendezvous;

    /// The processes of a run, all of them in this one.
    fn peers(world_size: usize) -> Vec<Peers> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let rendezvous = Rendezvous { host: "127.0.0.1".to_owned(), port, serves: true, prefix: "/test".to_owned() };
        let process = |rank| ProcessEnv {
            rank,
            world_size,
            local_rank: rank,
            local_world_size: world_size,
            rendezvous: rendezvous.clone(),
        };
        (0..world_size).map(|rank| Peers::connect(&process(rank), rank == 0).unwrap()).collect()
    }

    #[test]
    fn the_first_failure_ends_the_others_with_its_message_and_exit_code() {
        let peers = peers(3);
        let failure =
            |rank, exit_code, message: &str| Failure { rank, exit_code, message: message.to_owned(), is_silent: false };
        assert_eq!(peers[0].failure().unwrap(), None);
        peers[2].publish(&failure(2, 3, "the disk is full")).unwrap();
        peers[1].publish(&failure(1, 1, "too late")).unwrap();
        let error =
            Watch::new(peers.into_iter().next().unwrap(), Instant::now()).beat(Instant::now()).unwrap().unwrap();
        assert_eq!((error.to_string().as_str(), error.exit_code()), ("process 2 of 3 failed: the disk is full", 3));
    }

    #[test]
    fn a_process_that_shows_no_life_is_found_by_the_next_one() {
        let start = Instant::now();
        let mut watches: Vec<Watch> = peers(3).into_iter().map(|peers| Watch::new(peers, start)).collect();
        let mut beat = |rank: usize, seconds: u64| {
            let error = watches[rank].beat(start + Duration::from_secs(seconds)).unwrap();
            error.map(|error| error.to_string())
        };
        // The last one starts late.
        for (rank, seconds) in [(0, 0), (1, 0), (0, 200), (1, 200), (2, 200), (0, 201), (1, 201)] {
            assert_eq!(beat(rank, seconds), None);
        }
        // Process 1 no longer beats.
        for seconds in [210, 220] {
            assert_eq!((beat(2, seconds), beat(0, seconds)), (None, None));
        }
        let message = beat(2, 231).unwrap();
        assert!(message.starts_with("process 1 of 3 failed: it ended without a message"), "{message}");
        assert_eq!(beat(0, 231), Some(message));
    }

    #[test]
    fn the_failure_of_a_process_is_its_last_word_though_the_store_is_gone() {
        let own_failure = OnceLock::new();
        let words = |report: Option<Option<Error>>, is_stopped: bool| {
            let (sender, reports) = channel();
            report.into_iter().for_each(|report| sender.send(report).unwrap());
            let sender = (!is_stopped).then_some(sender);
            let found = last_words(&reports, 2, &own_failure, Duration::ZERO);
            drop(sender);
            found
        };
        assert_eq!(words(Some(None), true), None);
        let (message, exit_code) = words(Some(Some(lost_store(2, "reset"))), true).unwrap();
        assert!(message.starts_with("process 0 of 2 failed: it") && exit_code == 3, "{message}");
        own_failure.set(("the data is bad".to_owned(), 2)).unwrap();
        for report in [Some(Some(lost_store(2, "reset"))), None] {
            assert_eq!(words(report, false), Some(("the data is bad".to_owned(), 2)));
        }
        assert_eq!(words(None, true), None, "the process prints its failure itself");
    }

    #[test]
    fn a_process_that_never_starts_is_named() {
        let start = Instant::now();
        let mut watch = Watch::new(peers(2).swap_remove(0), start);
        assert!(watch.beat(start).unwrap().is_none());
        let error = watch.beat(start + Duration::from_secs(301)).unwrap().unwrap();
        assert_eq!(error.to_string(), "process 1 of 2 failed: it did not start within 5 minutes");
    }
}
