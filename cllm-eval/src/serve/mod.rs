//! `serve` answers requests of OpenAI's protocol: models are decoded with any strategy, and requests
//! join and leave a running batch.
//!
//! Three parts work together. `connections` and `routes` read requests and write responses, on the
//! threads of tokio. `answers` asks the engine for the answers to a request and makes text of their
//! tokens. `engine` decodes, on the thread that called `serve`.

mod answers;
mod api_error;
mod app;
mod connections;
mod engine;
mod fields;
mod guard;
mod lanes;
mod metrics;
mod models;
mod page;
mod requests;
mod responses;
mod routes;
mod scored_texts;
mod scoring;
mod settings;
mod text;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use axum::Router;
use cllm_core::program::{Outcome, catch_panics, print, print_json};
use cllm_core::{Error, Result, interrupt, io_reason, progress};
use serde_json::json;

use app::App;
use connections::Connections;
use guard::API_KEY;
use metrics::Metrics;
pub use settings::ServeSettings;

/// Time between two looks at whether the server is to stop.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);
/// Time to tell clients that their answers were cut.
const FAREWELL_TIME: Duration = Duration::from_secs(5);
/// Threads that read requests and write responses.
const NUM_SERVER_THREADS: usize = 4;

/// Whether the server is to stop, shared by its threads.
#[derive(Clone, Default)]
struct Stop {
    /// It takes no more requests.
    is_stopping: Arc<AtomicBool>,
    /// Answers that still run are cut.
    abort: Arc<AtomicBool>,
    engine_has_failed: Arc<AtomicBool>,
}

/// Serves until a signal asks to stop, and prints the server's address once it takes requests.
///
/// # Errors
/// When a model cannot be loaded, the address is taken, or decoding fails.
pub fn serve(settings: &ServeSettings, json: bool) -> Result<Outcome> {
    let api_key = api_key()?;
    let plan = lanes::plan(settings)?;
    let cors = guard::cors(&settings.cors_origins)?;
    let listener = listen(settings)?;
    let address = listener.local_addr().map_err(|error| unusable(settings, &error))?;
    if !settings.host.is_loopback() && api_key.is_none() {
        progress::log(format!("whoever reaches {address} can use the server: set {API_KEY} to ask for a key"));
    }
    let weights = plan.load_weights(settings)?;
    let models = plan.lane_models(&weights);
    let mut decoders = models.iter().map(engine::LaneModel::decoder).collect::<Result<Vec<_>>>()?;
    let (jobs, received_jobs) = mpsc::channel();
    let (metrics, stop) = (Arc::new(Metrics::new()), Stop::default());
    let app = App {
        settings: settings.clone(),
        models: plan.served_models(),
        jobs,
        metrics: Arc::clone(&metrics),
        api_key,
        created: responses::unix_seconds(),
        is_stopping: Arc::clone(&stop.is_stopping),
    };
    let served: Vec<_> = app.models.iter().map(|model| model.json(app.created)).collect();
    let router = routes::router(&Arc::new(app), cors);
    let (drain_time, stop_of_server) = (Duration::from_secs(settings.drain_seconds), stop.clone());
    let server = std::thread::spawn(move || run_server(listener, router, &stop_of_server, drain_time));
    let url = format!("http://{address}");
    if json {
        print_json(&json!({ "schema_version": 1, "url": url, "models": served }))?;
    } else {
        print(&url)?;
    }
    let decoded = catch_panics(|| engine::run(&models, &mut decoders, &received_jobs, &stop.abort, &metrics));
    stop.engine_has_failed.store(decoded.is_err(), Ordering::Relaxed);
    drop(received_jobs);
    let outcome = server.join().map_err(|_| Error::internal("the server's thread has panicked"))?;
    decoded.and(outcome)
}

/// The hash of the key that requests must have, from the environment: a command line or a file would
/// show the key to others.
fn api_key() -> Result<Option<blake3::Hash>> {
    match std::env::var(API_KEY) {
        Ok(key) if key.is_empty() => Err(Error::usage(format!("{API_KEY} is empty: set it to a key, or unset it"))),
        Ok(key) => Ok(Some(blake3::hash(key.as_bytes()))),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(Error::usage(format!("{API_KEY} is not valid UTF-8"))),
    }
}

fn listen(settings: &ServeSettings) -> Result<TcpListener> {
    let address = SocketAddr::new(settings.host, settings.port);
    let listener = TcpListener::bind(address).map_err(|error| unusable(settings, &error))?;
    listener.set_nonblocking(true).map_err(|error| unusable(settings, &error))?;
    Ok(listener)
}

fn unusable(settings: &ServeSettings, error: &std::io::Error) -> Error {
    let (host, port) = (settings.host, settings.port);
    Error::environment(format!(
        "cannot listen on {host}, port {port}: {}: choose another with port=... or host=...",
        io_reason(error)
    ))
}

/// Runs the server until it is to stop, and then until its responses are sent, or its time for that
/// is up.
fn run_server(listener: TcpListener, router: Router, stop: &Stop, drain_time: Duration) -> Result<Outcome> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(NUM_SERVER_THREADS).enable_all().build();
    let runtime = runtime
        .map_err(|error| Error::environment(format!("the server's threads cannot start: {}", io_reason(&error))))?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)
            .map_err(|error| Error::environment(format!("cannot listen: {}", io_reason(&error))))?;
        let connections = Connections::new(router);
        tokio::select! {
            () = connections.accept(&listener) => {}
            () = stop_request(stop) => {}
        }
        drop(listener);
        stop.is_stopping.store(true, Ordering::Relaxed);
        progress::log(format!("stopping: running answers have {} s to end", drain_time.as_secs()));
        let mut closing = std::pin::pin!(connections.close());
        if tokio::time::timeout(drain_time, &mut closing).await.is_ok() {
            return Ok(Outcome::Done);
        }
        progress::log("stopping: answers that still run are cut");
        stop.abort.store(true, Ordering::Relaxed);
        let _ = tokio::time::timeout(FAREWELL_TIME, closing).await;
        Ok(Outcome::Negative)
    })
}

/// Returns when a signal asks to stop, or decoding has failed.
async fn stop_request(stop: &Stop) {
    while interrupt::requested().is_none() && !stop.engine_has_failed.load(Ordering::Relaxed) {
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}
