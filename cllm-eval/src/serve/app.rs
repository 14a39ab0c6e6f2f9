//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;

use axum::http::StatusCode;

use super::api_error::ApiError;
use super::engine::Job;
use super::metrics::Metrics;
use super::models::ServedModel;
use super::settings::ServeSettings;

pub(super) struct App {
    pub(super) settings: ServeSettings,
    pub(super) models: Vec<Arc<ServedModel>>,
    pub(super) jobs: Sender<Job>,
    pub(super) metrics: Arc<Metrics>,
    /// Hash of the key that requests must have.
    pub(super) api_key: Option<blake3::Hash>,
    /// When the server was started, in seconds since 1970.
    pub(super) created: u64,
    /// A signal has asked to stop.
    pub(super) is_stopping: Arc<AtomicBool>,
}

impl App {
    /// The model that a request names; the first if it names none.
    ///
    /// # Errors
    /// For a name that no model has.
    pub(super) fn model(&self, id: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let named = |model: &&Arc<ServedModel>| id.is_none_or(|id| model.id == id);
        self.models.iter().find(named).cloned().ok_or_else(|| {
            let ids: Vec<&str> = self.models.iter().map(|model| model.id.as_str()).collect();
            let message = format!("model: there is no `{}` here, only {}", id.unwrap_or_default(), ids.join(", "));
            let error = ApiError::new(StatusCode::NOT_FOUND, message).with_code("model_not_found");
            ApiError { param: Some("model".to_owned()), ..error }
        })
    }
}
