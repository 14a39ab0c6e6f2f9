//! How `generate` and the chat decode, as a user writes it.

use cllm_core::decode::{Sampling, Strategy};
use cllm_core::{Error, Result, settings};
use garde::Validate;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Validate)]
#[serde(default, deny_unknown_fields)]
struct Decoding {
    #[garde(skip)]
    strategy: Strategy,
    #[garde(range(min = 0.0, max = 10.0))]
    temperature: f64,
    #[garde(skip)]
    seed: u64,
}

impl Default for Decoding {
    fn default() -> Self {
        Decoding { strategy: Strategy::rolling(16), temperature: 0.0, seed: 0 }
    }
}

/// Reads a strategy as settings files write it: `rolling`, or `{jacobi: {n: 8}}`.
///
/// # Errors
/// [`Error::Usage`] for an unknown strategy, or one that needs a second model.
pub(crate) fn parse_strategy(text: &str) -> Result<Strategy> {
    let Decoding { strategy, .. } = settings::load(None, &[format!("strategy={text}")])?;
    strategy.check()?;
    match strategy.needs_draft_model() {
        true => {
            Err(Error::usage(format!("strategy `{}` needs a draft model, and a chat has one model", strategy.name())))
        }
        false => Ok(strategy),
    }
}

/// Reads a temperature.
///
/// # Errors
/// [`Error::Usage`] for anything but a number from 0 to 10.
pub(crate) fn parse_temperature(text: &str) -> Result<f64> {
    settings::load(None, &[format!("temperature={text}")]).map(|decoding: Decoding| decoding.temperature)
}

/// Reads a seed.
///
/// # Errors
/// [`Error::Usage`] for anything but a whole number from 0.
pub(super) fn parse_seed(text: &str) -> Result<u64> {
    settings::load(None, &[format!("seed={text}")]).map(|decoding: Decoding| decoding.seed)
}

/// `greedy`, or the temperature.
pub(super) fn sampling_text(sampling: Sampling) -> String {
    match sampling {
        Sampling::Greedy => "greedy".to_owned(),
        Sampling::Temperature(temperature) => format!("temperature {temperature}"),
        Sampling::Nucleus { temperature, top_p } => format!("temperature {temperature}, top-p {top_p}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_are_written_as_in_settings() {
        assert_eq!(parse_strategy("rolling").unwrap(), Strategy::rolling(16));
        assert_eq!(parse_strategy("{jacobi: {n: 8}}").unwrap(), Strategy::Jacobi { n: 8 });
        for (text, part) in
            [("roling", "did you mean `rolling`"), ("drafted", "draft model"), ("{rolling: {n: 1}}", "n=1")]
        {
            assert!(parse_strategy(text).unwrap_err().to_string().contains(part), "{text}");
        }
        assert!(parse_temperature("warm").unwrap_err().to_string().contains("expected a number"));
        assert!(parse_temperature("-1").is_err());
        assert_eq!(parse_seed("7").unwrap(), 7);
        assert!(parse_seed("-1").unwrap_err().to_string().contains("a whole number from 0"));
    }
}
