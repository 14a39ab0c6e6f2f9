//! Sliding windows: layers in which a token attends only to the tokens right before it (Mistral 7B,
//! arXiv 2310.06825). Windows count positions of a sequence, and the token itself, as in
//! `transformers`.

use tch::Tensor;

use super::config::ModelConfig;

/// What the layers with the same sliding window share, such as a mask. It is made once for each
/// window of a model, `None` being that of layers without one.
pub(crate) struct PerWindow<T>(Vec<(Option<i32>, T)>);

impl<T> PerWindow<T> {
    pub(crate) fn new(config: &ModelConfig, mut make: impl FnMut(Option<i32>) -> T) -> Self {
        let mut windows = config.sliding_windows.clone();
        windows.sort_unstable();
        windows.dedup();
        PerWindow(windows.into_iter().map(|window| (window, make(window))).collect())
    }

    /// For the layers with a window that the model has.
    pub(crate) fn get(&self, window: Option<i32>) -> &T {
        let found = self.0.iter().find(|(other, _)| *other == window);
        &found.expect("there is one for each window of the model").1
    }
}

impl<T, E> PerWindow<Result<T, E>> {
    pub(crate) fn transpose(self) -> Result<PerWindow<T>, E> {
        self.0.into_iter().map(|(window, made)| Ok((window, made?))).collect::<Result<_, E>>().map(PerWindow)
    }
}

/// True where a key is within the window of a query, by their positions (int64, of shapes that
/// broadcast).
pub(super) fn is_within(window: i32, queries: &Tensor, keys: &Tensor) -> Tensor {
    (queries - keys).lt(i64::from(window))
}
