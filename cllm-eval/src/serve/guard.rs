//! Who may use the server.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use cllm_core::{Error, Result};
use tower_http::cors::CorsLayer;

use super::api_error::ApiError;
use super::app::App;

/// The environment variable with the key that requests must have.
pub(super) const API_KEY: &str = "CLLM_API_KEY";

/// Refuses requests without the key, if there is one. Hashes are compared in constant time.
pub(super) async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
    if app.api_key.is_some_and(|key| key != blake3::hash(given.as_bytes())) {
        let message = "expected the header `Authorization: Bearer KEY` with the key of the server";
        return ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key").into_response();
    }
    next.run(request).await
}

/// On a loopback address without a key, refuses requests under other names than those of this
/// machine. A web page could otherwise give its own name this address (DNS rebinding) and use the
/// server in the name of whoever looks at it.
pub(super) async fn check_host(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let is_guarded = app.settings.host.is_loopback() && app.api_key.is_none();
    let host = request.headers().get(header::HOST).and_then(|value| value.to_str().ok());
    if is_guarded && !host.is_none_or(is_local_name) {
        let message = format!("the server answers as localhost only: to reach it under another name, set {API_KEY}");
        return ApiError::new(StatusCode::FORBIDDEN, message).with_code("unknown_host").into_response();
    }
    next.run(request).await
}

fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || address.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

/// Lets web pages of some origins use the server; none by default.
///
/// # Errors
/// For a text that is no origin.
pub(super) fn cors(origins: &[String]) -> Result<CorsLayer> {
    let origin = |origin: &String| {
        let is_origin =
            origin.split_once("://").is_some_and(|(_, host)| !host.is_empty() && !host.contains(['/', '*']));
        HeaderValue::from_str(origin).ok().filter(|_| is_origin).ok_or_else(|| {
            Error::usage(format!("cors_origins: `{origin}` is no origin: expected one like https://example.org"))
        })
    };
    let origins = origins.iter().map(origin).collect::<Result<Vec<_>>>()?;
    let headers = [header::AUTHORIZATION, header::CONTENT_TYPE];
    Ok(CorsLayer::new().allow_origin(origins).allow_methods([Method::GET, Method::POST]).allow_headers(headers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine_are_local() {
        for host in ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.3.2.1", "[::1]:8000", "[::1]"] {
            assert!(is_local_name(host), "{host}");
        }
        for host in ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", "127.0.0.1.x", ""] {
            assert!(!is_local_name(host), "{host}");
        }
    }

    #[test]
    fn only_origins_are_origins() {
        assert!(cors(&["https://example.org".to_owned(), "http://localhost:3000".to_owned()]).is_ok());
        for wrong in ["*", "example.org", "https://example.org/", "https://*.example.org"] {
            let message = cors(&[wrong.to_owned()]).unwrap_err().to_string();
            assert!(message.contains(&format!("`{wrong}` is no origin")), "{message}");
        }
    }
}
