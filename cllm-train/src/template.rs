//! `template`: settings files to begin with, each with comments.

use cllm_core::settings::{did_you_mean, template};
use cllm_core::{Error, Result};

use crate::settings::Settings;

/// The recipes in configs/, by name.
const RECIPES: [(&str, &str); 19] = [
    ("spider-teacher", include_str!("../../configs/spider-teacher.yaml")),
    ("spider-lossless", include_str!("../../configs/spider-lossless.yaml")),
    ("spider-drafted", include_str!("../../configs/spider-drafted.yaml")),
    ("spider-student", include_str!("../../configs/spider-student.yaml")),
    ("gsm8k-teacher", include_str!("../../configs/gsm8k-teacher.yaml")),
    ("gsm8k-lossless", include_str!("../../configs/gsm8k-lossless.yaml")),
    ("gsm8k-drafted", include_str!("../../configs/gsm8k-drafted.yaml")),
    ("gsm8k-student", include_str!("../../configs/gsm8k-student.yaml")),
    ("chat-lossless", include_str!("../../configs/chat-lossless.yaml")),
    ("chat-drafted", include_str!("../../configs/chat-drafted.yaml")),
    ("chat-student", include_str!("../../configs/chat-student.yaml")),
    ("code-lossless", include_str!("../../configs/code-lossless.yaml")),
    ("code-drafted", include_str!("../../configs/code-drafted.yaml")),
    ("code-student", include_str!("../../configs/code-student.yaml")),
    ("quickstart-student", include_str!("../../configs/quickstart-student.yaml")),
    ("quickstart-lora", include_str!("../../configs/quickstart-lora.yaml")),
    ("rounds", include_str!("../../configs/rounds.yaml")),
    ("tiny-teacher", include_str!("../../configs/tiny-teacher.yaml")),
    ("run", ""),
];

/// The settings file of a recipe; that of `run` has every setting at its default.
///
/// # Errors
/// [`Error::Usage`] for an unknown recipe.
pub fn recipe(name: &str) -> Result<String> {
    match RECIPES.iter().find(|(other, _)| *other == name) {
        Some((_, "")) => Ok(format!("# cllm-train run -c FILE\n{}", template::<Settings>())),
        Some((_, text)) => Ok((*text).to_owned()),
        None => {
            let names: Vec<String> = RECIPES.iter().map(|(name, _)| (*name).to_owned()).collect();
            let hint = did_you_mean(name, &names);
            Err(Error::usage(format!("there is no recipe `{name}`{hint}; the recipes are {}", names.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_template_holds_the_defaults_and_says_what_they_do() {
        let text = recipe("run").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.yaml");
        std::fs::write(&file, &text).unwrap();
        let required = ["datasets=[x]", "output=y"].map(str::to_owned);
        let settings: Settings = cllm_core::settings::load(Some(&file), &required).unwrap();
        let expected = Settings { datasets: vec!["x".into()], output: "y".into(), ..Settings::default() };
        assert_eq!(json!(settings), json!(expected));
        assert!(text.contains("# Passes over the data.\nepochs: 4\n"), "{text}");
        assert!(text.lines().all(|line| line.len() <= 100), "{text}");
        assert!(recipe("spider-student").unwrap().contains("anchor_weight: 10"));
        assert!(recipe("spider-studen").unwrap_err().to_string().contains("did you mean `spider-student`"));
    }
}
