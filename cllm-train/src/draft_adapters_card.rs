//! The model card of adapters that act on draft tokens alone. Other tools would apply them to every
//! token, so the folder says what they are for.

use std::path::Path;

use cllm_core::{Result, atomic_file};

/// Writes the card of adapters of the model `base` into `folder`, which will be `target`.
///
/// # Errors
/// File-system errors.
pub fn write(folder: &Path, base: &str, target: &Path) -> Result<()> {
    atomic_file::write(&folder.join("README.md"), card(base, &target.display().to_string()).as_bytes())
}

fn card(base: &str, adapters: &str) -> String {
    format!(
        "---
base_model: {base}
pipeline_tag: text-generation
tags: [consistency-llm, jacobi-decoding, lora]
---

# Adapters for the draft tokens of {base}

With these low-rank adapters, {base} proposes several tokens per forward and verifies them itself.
The adapters act on draft tokens alone (gated LoRA, arXiv 2507.11851), so its answers stay its own,
token for token, whatever they have learnt.

They are in PEFT's format, with the field `adapted_tokens` in adapter_config.json. **Do not merge
them, nor load them with a tool that applies adapters to every token**: both change the answers.

Decode with the strategy `gated` of the CLLM toolkit, here compared with autoregressive decoding:

    cllm-eval run teacher={base} student={adapters} \\
        strategies='[ar, {{gated: {{n: 16}}}}]' benchmark=... data=... output=...

`{base}` is read from the place that adapter_config.json names.
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_names_the_model_and_the_strategy() {
        let card = card("org/base", "runs/x/final");
        assert!(card.starts_with("---\nbase_model: org/base\n"));
        assert!(card.contains("teacher=org/base student=runs/x/final \\\n"), "{card}");
        assert!(card.contains("[ar, {gated: {n: 16}}]"), "{card}");
    }
}
