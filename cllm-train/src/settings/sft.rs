use cllm_core::prompt_set::Turns;
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The supervised objective.
#[derive(Debug, Clone, Default, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftSettings {
    /// The turns of a conversation that the loss covers.
    #[garde(skip)]
    pub turns: Turns,
}
