//! One value for each of the four losses, by name. Weights, sums, token counts and gradients of the
//! losses all have this form, so that no loss can be mistaken for another.

/// A value per loss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Losses<T> {
    /// Autoregressive: cross-entropy of the labels.
    pub ar: T,
    /// Global consistency: divergence of the noisy tokens from the fixed point.
    pub global: T,
    /// Local consistency: divergence of the noisy tokens from the next state.
    pub local: T,
    /// Anchor: KL divergence of the student from the frozen model.
    pub anchor: T,
}

impl<T> Losses<T> {
    /// The values in the order autoregressive, global, local, anchor.
    pub fn into_array(self) -> [T; 4] {
        [self.ar, self.global, self.local, self.anchor]
    }

    /// The inverse of [`Self::into_array`].
    pub fn from_array([ar, global, local, anchor]: [T; 4]) -> Self {
        Losses { ar, global, local, anchor }
    }

    pub fn map<U>(self, change: impl FnMut(T) -> U) -> Losses<U> {
        Losses::from_array(self.into_array().map(change))
    }

    pub fn zip<U>(self, other: Losses<U>) -> Losses<(T, U)> {
        Losses {
            ar: (self.ar, other.ar),
            global: (self.global, other.global),
            local: (self.local, other.local),
            anchor: (self.anchor, other.anchor),
        }
    }

    pub fn as_ref(&self) -> Losses<&T> {
        Losses { ar: &self.ar, global: &self.global, local: &self.local, anchor: &self.anchor }
    }

    pub fn as_mut(&mut self) -> Losses<&mut T> {
        Losses { ar: &mut self.ar, global: &mut self.global, local: &mut self.local, anchor: &mut self.anchor }
    }
}

impl Losses<f64> {
    pub fn weighted_sum(self, weights: Losses<f64>) -> f64 {
        self.zip(weights).into_array().into_iter().map(|(loss, weight)| loss * weight).sum()
    }
}

impl Losses<usize> {
    /// Divisors that turn sums over tokens into means; 1 for a loss without tokens.
    pub fn divisors(self) -> Losses<f64> {
        self.map(|num_tokens| (num_tokens as f64).max(1.0))
    }
}
