//! Completions for a shell: those of the command line, and in bash and fish the keys of settings and
//! their values, which are read from the reference of the settings.

use std::fmt::Write;

use super::print;
use crate::{Error, Result};

/// The settings of some verbs.
struct Section<'r> {
    verbs: Vec<&'r str>,
    /// Each key with the values that it may have, if these are few.
    keys: Vec<(&'r str, Vec<&'r str>)>,
}

/// Prints a program's completions for a shell. `reference` describes the settings of its verbs.
///
/// # Errors
/// When stdout cannot be written.
pub fn print_completions(shell: clap_complete::Shell, mut program: clap::Command, reference: &str) -> Result<()> {
    use clap_complete::Generator;
    let name = program.get_name().to_owned();
    program.set_bin_name(name.clone());
    program.build();
    let mut script = Vec::new();
    shell.try_generate(&program, &mut script).map_err(Error::write("stdout"))?;
    let mut script = String::from_utf8_lossy(&script).into_owned();
    let sections: Vec<Section<'_>> = reference.split("### ").skip(1).map(Section::read).collect();
    match shell {
        clap_complete::Shell::Bash => script += &in_bash(&name, &sections),
        clap_complete::Shell::Fish => script += &in_fish(&name, &sections),
        _ => {}
    }
    print(&script)
}

impl<'r> Section<'r> {
    fn read(section: &'r str) -> Self {
        let heading = section.lines().next().unwrap_or_default();
        let verbs = heading.split_whitespace().skip(1).map(|word| word.trim_end_matches(',')).collect();
        // | `key` | type | default | allowed | what it does<br>`choice`: what that does |
        let keys = section.lines().filter_map(|line| {
            let (key, rest) = line.strip_prefix("| `")?.split_once('`')?;
            let type_name = rest.split('|').nth(1).unwrap_or_default().trim();
            let choices = rest.split("<br>`").skip(1).filter_map(|choice| choice.split(['`', ':']).next());
            let values = if type_name == "boolean" { vec!["true", "false"] } else { choices.collect() };
            // The choices in a list need brackets.
            Some((key, if type_name.starts_with("list") { Vec::new() } else { values }))
        });
        Section { verbs, keys: keys.collect() }
    }
}

/// Bash divides words at `=`, so a key and its values are completed apart. Without values, bash
/// completes file names.
fn in_bash(name: &str, sections: &[Section<'_>]) -> String {
    let (mut keys, mut values) = (String::new(), String::new());
    for Section { verbs, keys: of_section } in sections {
        let words: Vec<String> = of_section.iter().map(|(key, _)| format!("{key}=")).collect();
        let _ = writeln!(keys, "        {}) keys=\"{}\" ;;", verbs.join("|"), words.join(" "));
        for (key, choices) in of_section.iter().filter(|(_, choices)| !choices.is_empty()) {
            for verb in verbs {
                let _ = writeln!(values, "        {verb}.{key}) values=\"{}\" ;;", choices.join(" "));
            }
        }
    }
    format!(
        r#"
_{name}_settings() {{
    _{name} "$@"
    local word="${{COMP_LINE:0:COMP_POINT}}" verb="${{COMP_WORDS[1]}}" keys="" values=""
    word="${{word##* }}"
    case "$verb" in
{keys}    esac
    [[ -z $keys || $word == -* || $COMP_CWORD -lt 2 ]] && return
    if [[ $word != *=* ]]; then
        compopt -o nospace
        COMPREPLY=($(compgen -W "$keys" -- "$word"))
        return
    fi
    case "$verb.${{word%%=*}}" in
{values}    esac
    COMPREPLY=($(compgen -W "$values" -- "${{word#*=}}"))
}}
complete -o bashdefault -o default -F _{name}_settings {name}
"#
    )
}

fn in_fish(name: &str, sections: &[Section<'_>]) -> String {
    let mut script = String::new();
    for Section { verbs, keys } in sections {
        let words = keys.iter().flat_map(|(key, choices)| {
            let bare = choices.is_empty().then(|| format!("{key}="));
            bare.into_iter().chain(choices.iter().map(move |choice| format!("{key}={choice}")))
        });
        let (verbs, words) = (verbs.join(" "), words.collect::<Vec<_>>().join(" "));
        let _ = writeln!(script, "complete -c {name} -n \"__fish_seen_subcommand_from {verbs}\" -a \"{words}\"");
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFERENCE: &str = "### cllm-x run, plan\n\n| key | type |\n| --- | --- |\n\
        | `model` | string | none |  | The model. |\n| `keep` | boolean | `false` |  | Keep it. |\n\
        | `context` | choice | `clean` |  | What.<br>`clean`: This.<br>`noisy`: That. |\n\
        | `strategies` | list of choices | `[]` |  | How.<br>`ar`: So. |\n";

    #[test]
    fn keys_and_values_come_from_the_reference() {
        let sections: Vec<Section<'_>> = REFERENCE.split("### ").skip(1).map(Section::read).collect();
        let bash = in_bash("cllm-x", &sections);
        assert!(bash.contains(r#"run|plan) keys="model= keep= context= strategies=" ;;"#), "{bash}");
        assert!(bash.contains(r#"plan.context) values="clean noisy" ;;"#), "{bash}");
        assert!(bash.contains(r#"run.keep) values="true false" ;;"#) && !bash.contains("run.strategies)"), "{bash}");
        let fish = in_fish("cllm-x", &sections);
        assert!(fish.contains(r#"-a "model= keep=true keep=false context=clean context=noisy strategies=""#), "{fish}");
    }
}
