//! Errors in OpenAI's form.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// What is wrong with a request, or why it has no answer.
#[derive(Debug, Clone)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) message: String,
    /// The field of the request that it is about.
    pub(super) param: Option<String>,
    pub(super) code: Option<&'static str>,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code: None }
    }

    /// A field that the client has to change (400).
    pub(super) fn field(param: impl Into<String>, message: impl AsRef<str>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", message.as_ref());
        ApiError { param: Some(param), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    pub(super) fn with_code(self, code: &'static str) -> Self {
        ApiError { code: Some(code), ..self }
    }

    pub(super) fn queue_is_full() -> Self {
        let message = "too many requests are waiting: try again in a moment";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_full")
    }

    /// The time of a request is up.
    pub(super) fn timeout() -> Self {
        let message = "the request took longer than timeout_seconds of the server: ask for fewer tokens, or raise it";
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout")
    }

    /// The server ends before the answer does.
    pub(super) fn stopping() -> Self {
        let message = "the server is being stopped and has no time left for this answer: try again later";
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("server_stopping")
    }

    /// The log-probabilities of a text could not be computed, for lack of memory for instance.
    pub(super) fn no_logprobs(error: &cllm_core::Error) -> Self {
        let message = format!(
            "the log-probabilities of this text cannot be computed ({error}): try again when fewer are asked for, or start \
             the server with a smaller batch_size or context"
        );
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("logprobs_failed")
    }

    /// The decode engine has failed.
    pub(super) fn engine() -> Self {
        let message = "decoding failed and the server ends: its log says why";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message).with_code("engine_failed")
    }

    /// The body of the response, and the last event of a stream.
    pub(super) fn json(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            429 => "rate_limit_error",
            400..=499 => "invalid_request_error",
            _ => "server_error",
        };
        json!({ "error": { "message": self.message, "type": kind, "param": self.param, "code": self.code } })
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.json())).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}
