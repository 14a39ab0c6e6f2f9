//! Connections: accepted until the server is to stop, each with limits on its time.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use cllm_core::progress;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

/// Connections at the same time; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 1024;
/// Maximum time for the head of a request, also after the response before it.
const HEAD_TIME: Duration = Duration::from_secs(60);
/// Maximum time in which a client takes nothing of what is sent to it.
const STALL_TIME: Duration = Duration::from_secs(60);
/// Time to wait when no connection can be accepted, such as for lack of file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// The connections that are open.
pub(super) struct Connections {
    router: Router,
    open: GracefulShutdown,
    slots: Arc<Semaphore>,
}

impl Connections {
    pub(super) fn new(router: Router) -> Self {
        Connections { router, open: GracefulShutdown::new(), slots: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }

    /// Accepts connections until the future is dropped.
    pub(super) async fn accept(&self, listener: &TcpListener) {
        loop {
            let Ok(slot) = Arc::clone(&self.slots).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => self.serve(stream, slot),
                Err(error) => {
                    progress::log(format!("a connection cannot be accepted: {error}"));
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    fn serve(&self, stream: TcpStream, slot: tokio::sync::OwnedSemaphorePermit) {
        // Small events should not wait for more to send.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(STALL_TIME));
        let service = TowerToHyperService::new(self.router.clone());
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME);
        let connection = self.open.watch(server.serve_connection(TokioIo::new(Box::pin(stream)), service));
        tokio::spawn(async move {
            // Clients come and go; what they did wrong is theirs to know.
            let _ = connection.await;
            drop(slot);
        });
    }

    /// Waits until all requests have their responses.
    pub(super) async fn close(self) {
        self.open.shutdown().await;
    }
}
