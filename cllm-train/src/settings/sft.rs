use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which turns of a conversation supervised fine-tuning teaches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Turns {
    /// Every turn of the assistant, each as an answer to the conversation before it.
    All,
    /// The last one, which is the reference.
    #[default]
    Last,
}

/// The supervised objective.
#[derive(Debug, Clone, Default, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftSettings {
    /// The turns of a conversation that the loss covers.
    #[garde(skip)]
    pub turns: Turns,
}
