//! Checks that a program's help, recipes and reference are true: every example parses, and
//! docs/configuration.md is current.

use std::path::Path;

/// The examples in the help of a program and of its verbs, each of which must have one, and the
/// commands in the first lines of the recipes in configs/. Each is split into words.
pub fn example_commands(program: clap::Command) -> Vec<Vec<String>> {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/").display().to_string();
    let mut commands = Vec::new();
    for command in std::iter::once(&program).chain(program.get_subcommands()) {
        // A backslash continues an example on the next line, as in a shell.
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default().replace("\\\n", " ");
        let lines: Vec<&str> =
            help.lines().map(str::trim).filter(|line| line.starts_with(program.get_name())).collect();
        assert!(!lines.is_empty(), "the help of `{}` has no example", command.get_name());
        let wide = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let wide = wide.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None, "an example of `{}` is wider than a terminal", command.get_name());
        for line in lines {
            // Redirection is the shell's, and a test runs in the folder of its crate.
            let words = shlex::split(line).unwrap().into_iter().take_while(|word| word != ">");
            commands.push(words.map(|word| word.replace("configs/", &configs)).collect());
        }
    }
    let recipes = Path::new(&configs).read_dir().unwrap().map(|entry| entry.unwrap().path());
    for recipe in recipes.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")) {
        let text = std::fs::read_to_string(&recipe).unwrap().replace("\\\n#", " ");
        let line = text.lines().next().and_then(|line| line.strip_prefix("# cllm-")).map(|line| format!("cllm-{line}"));
        let line = line.unwrap_or_else(|| panic!("{} does not begin with its command", recipe.display()));
        assert!(line.contains(&format!("configs/{}", recipe.file_name().unwrap().display())), "{line}");
        if line.starts_with(program.get_name()) {
            // Parentheses begin a remark.
            let words = shlex::split(line.split('(').next().unwrap()).unwrap().into_iter();
            commands.push(words.map(|word| word.replace("configs/", &configs)).collect());
        }
    }
    commands
}

/// Asserts that docs/configuration.md describes a program's current settings.
pub fn assert_documented(settings: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let documented = std::fs::read_to_string(path).unwrap();
    assert!(
        documented.split("\n## ").any(|program| program.trim_end().ends_with(settings.trim_end())),
        "docs/configuration.md is out of date: run scripts/write-reference"
    );
}
