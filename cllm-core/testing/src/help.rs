//! What the help and the documents say, held against a program; shared by the tests of all three.

use std::path::Path;

/// The words of every example in the help of a program and its verbs, each of which must have one, and of the commands that
/// the recipes in configs/ begin with.
pub fn example_commands(program: clap::Command) -> Vec<Vec<String>> {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/").display().to_string();
    let mut found = Vec::new();
    for command in std::iter::once(&program).chain(program.get_subcommands()) {
        // A long example goes on in the next line, as in a shell.
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default().replace("\\\n", " ");
        let lines: Vec<&str> =
            help.lines().map(str::trim).filter(|line| line.starts_with(program.get_name())).collect();
        assert!(!lines.is_empty(), "the help of `{}` has no example", command.get_name());
        for line in lines {
            // A test runs in the folder of its crate, and redirection is the shell's.
            let words = shlex::split(line).unwrap().into_iter().take_while(|word| word != ">");
            found.push(words.map(|word| word.replace("configs/", &configs)).collect());
        }
    }
    let recipes = Path::new(&configs).read_dir().unwrap().map(|entry| entry.unwrap().path());
    for recipe in recipes.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")) {
        let text = std::fs::read_to_string(&recipe).unwrap();
        let line = text.lines().next().and_then(|line| line.strip_prefix("# cllm-")).map(|line| format!("cllm-{line}"));
        let line = line.unwrap_or_else(|| panic!("{} does not begin with its command", recipe.display()));
        assert!(line.contains(&format!("configs/{}", recipe.file_name().unwrap().display())), "{line}");
        if line.starts_with(program.get_name()) {
            // What stands in parentheses is said of it.
            let words = shlex::split(line.split('(').next().unwrap()).unwrap().into_iter();
            found.push(words.map(|word| word.replace("configs/", &configs)).collect());
        }
    }
    found
}

/// Asserts that docs/configuration.md holds a program's settings as they are now.
pub fn assert_documented(settings: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let there = std::fs::read_to_string(path).unwrap();
    assert!(
        there.split("\n## ").any(|program| program.trim_end().ends_with(settings.trim_end())),
        "docs/configuration.md is out of date: run scripts/write-reference"
    );
}
