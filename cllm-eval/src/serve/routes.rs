//! The endpoints.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream::select_all;
use futures_util::{Stream, StreamExt};
use serde_json::{Value, json};
use tower_http::cors::CorsLayer;

use super::answers::{Order, Piece};
use super::api_error::ApiError;
use super::app::App;
use super::requests::Ask;
use super::responses::{Head, Usage};
use super::{guard, page};

/// Maximum time for the body of a request to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);
/// Time between comments in a stream that has nothing else to say. They tell that it is alive, and
/// whether its client is.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// All endpoints, with what guards them.
pub(super) fn router(app: &Arc<App>, cors: CorsLayer) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/metrics", get(metrics))
        .layer(middleware::from_fn_with_state(Arc::clone(app), guard::check_key));
    let open = Router::new().route("/health", get(health)).merge(page::routes());
    let routes = api
        .merge(open)
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(Arc::clone(app), guard::check_host))
        .layer(middleware::from_fn_with_state(Arc::clone(app), count_response))
        .with_state(Arc::clone(app));
    routes.layer(cors)
}

async fn count_response(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("other".to_owned(), |path| path.as_str().to_owned());
    let response = next.run(request).await;
    app.metrics.count_response(&path, response.status().as_u16());
    response
}

async fn unknown_path(uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("there is no endpoint {}", uri.path())).with_code("unknown_url")
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
}

/// Whether the server takes requests.
async fn health(State(app): State<Arc<App>>) -> Response {
    if app.is_stopping.load(Ordering::Relaxed) {
        return ApiError::stopping().into_response();
    }
    axum::Json(json!({ "status": "ok" })).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text =
        app.metrics.text().map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

async fn models(State(app): State<Arc<App>>) -> axum::Json<Value> {
    let models: Vec<Value> = app.models.iter().map(|model| model.json(app.created)).collect();
    axum::Json(json!({ "object": "list", "data": models }))
}

async fn model(
    State(app): State<Arc<App>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<axum::Json<Value>, ApiError> {
    Ok(axum::Json(app.model(Some(&id))?.json(app.created)))
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    answer(app, request, Ask::chat).await
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    answer(app, request, Ask::completion).await
}

/// What a response consists of.
#[derive(Clone, Copy)]
struct Contents {
    /// Each answer begins with its prompt.
    echo: bool,
    /// Otherwise there is nothing after the prompt.
    decodes: bool,
    /// The number of likeliest tokens beside each token, if log-probabilities are asked for.
    num_top: Option<usize>,
    /// A stream ends with the numbers of tokens.
    include_usage: bool,
}

async fn answer(
    app: Arc<App>,
    request: Request,
    parse: fn(&[u8]) -> Result<Ask, ApiError>,
) -> Result<Response, ApiError> {
    if app.is_stopping.load(Ordering::Relaxed) {
        return Err(ApiError::stopping());
    }
    let body = read_body(&app, request).await?;
    let ask = parse(&body)?;
    let model = app.model(ask.model.as_deref())?;
    let head = Head::new(&model.id, ask.prompts.is_chat());
    let stream = ask.stream;
    let contents = Contents {
        echo: ask.echo,
        decodes: ask.max_tokens != Some(0),
        num_top: ask.top_logprobs,
        include_usage: ask.include_usage,
    };
    // A long prompt takes its time to tokenize, and others should not wait for it.
    let order = tokio::task::spawn_blocking(move || Order::new(app, model, ask)).await;
    let order = order.map_err(|_| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the prompt could not be tokenized: the server's log says why")
    })??;
    if stream {
        return Ok(respond_in_parts(order, head, contents));
    }
    let mut answers = Vec::new();
    if contents.decodes {
        for choice in order.submit(None) {
            answers.push(order.whole(choice).await?);
        }
    } else {
        answers = order.empty_answers();
    }
    if let Some(num_top) = contents.num_top {
        for answer in &mut answers {
            answer.scores = Some(order.score(answer, contents.echo, num_top).await?);
            if contents.echo {
                order.add_prompt_offsets(answer)?;
            }
        }
    }
    Ok(axum::Json(head.whole(&order, &answers, contents.echo)).into_response())
}

/// Reads the body of a request. It has to be JSON by its type too: a web page of another origin can
/// send other types without asking first.
async fn read_body(app: &App, request: Request) -> Result<Vec<u8>, ApiError> {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = content_type.and_then(|value| value.split(';').next()).unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        let message = "expected the header `Content-Type: application/json`";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message).with_code("wrong_content_type"));
    }
    let max = app.settings.max_body_bytes;
    match tokio::time::timeout(BODY_TIME, to_bytes(request.into_body(), max)).await {
        Ok(Ok(bytes)) => Ok(bytes.to_vec()),
        Ok(Err(error)) if is_too_long(&error) => {
            let message = format!("the body has more than {max} bytes (max_body_bytes of the server): shorten it");
            Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("body_too_large"))
        }
        Ok(Err(error)) => Err(ApiError::new(StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}"))),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body of the request took too long to arrive")),
    }
}

fn is_too_long(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.to_string().contains("length limit"))
}

/// Sends the answers as server-sent events while they grow.
fn respond_in_parts(order: Order, head: Head, contents: Contents) -> Response {
    let events = parts(order, head, contents).map(|part| {
        let data = match part {
            Ok(Some(chunk)) => chunk.to_string(),
            Ok(None) => "[DONE]".to_owned(),
            Err(error) => error.json().to_string(),
        };
        Ok::<_, Infallible>(SseEvent::default().data(data))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// The chunks of a stream, and `None` at its end.
fn parts(order: Order, head: Head, contents: Contents) -> impl Stream<Item = Result<Option<Value>, ApiError>> {
    let Contents { echo, decodes, num_top, include_usage } = contents;
    async_stream::try_stream! {
        let tokenizer = &order.model.tokenizer;
        // Characters of each choice before its answer.
        let mut num_echoed = vec![0; order.num_choices()];
        let mut usage = Usage {
            prompt_tokens: order.prompts.iter().map(|prompt| prompt.ids.len()).sum(),
            ..Usage::default()
        };
        for mut answer in if echo { order.empty_answers() } else { Vec::new() } {
            let prompt = &order.prompts[answer.prompt];
            num_echoed[answer.index] = prompt.text.chars().count();
            let mut chunk = head.chunk(answer.index, &prompt.text, false, (!decodes).then_some(answer.reason));
            if let Some(num_top) = num_top {
                let scores = order.score(&answer, echo, num_top).await?;
                order.add_prompt_offsets(&mut answer)?;
                chunk["choices"][0]["logprobs"] = head.logprobs(tokenizer, &prompt.ids, &answer.offsets, &scores);
            }
            yield Some(chunk);
        }
        let choices = if decodes { order.submit(num_top) } else { Vec::new() };
        let pieces = choices.into_iter().map(|choice| {
            let index = choice.index;
            order.pieces(choice).map(move |piece| (index, piece)).boxed()
        });
        let mut pieces = select_all(pieces);
        while let Some((index, piece)) = pieces.next().await {
            match piece? {
                Piece::Started { num_cached } => {
                    usage.cached_tokens += num_cached;
                    if head.is_chat {
                        yield Some(head.chunk(index, "", true, None));
                    }
                }
                Piece::Tokens { ids, text, mut offsets, seconds, scores } => {
                    usage.completion_tokens += ids.len();
                    usage.forwards += 1;
                    let mut chunk = head.chunk(index, &text, false, None);
                    chunk["decoded"] = json!({ "tokens": ids.len(), "seconds": seconds });
                    if num_top.is_some() {
                        offsets.iter_mut().for_each(|offset| *offset += num_echoed[index]);
                        chunk["choices"][0]["logprobs"] = head.logprobs(tokenizer, &ids, &offsets, &scores);
                    }
                    yield Some(chunk);
                }
                Piece::End { text, reason } => yield Some(head.chunk(index, &text, false, Some(reason))),
            }
        }
        if include_usage {
            yield Some(head.usage_chunk(usage));
        }
        yield None;
    }
}
