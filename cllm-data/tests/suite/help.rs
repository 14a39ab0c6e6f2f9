//! The help of the verbs.

use crate::fixtures::run_text;

#[test]
fn the_help_of_every_verb_ends_with_an_example() {
    for verb in ["prepare", "collect", "augment", "clean", "validate", "stats", "inspect", "import", "export"] {
        let help = run_text(&[verb, "--help"]);
        assert!(help.contains(&format!(":\n  cllm-data {verb} ")), "{verb}");
    }
}
