//! What the program finds on its machine: libtorch, GPUs, models.

use serde_json::Value;

use crate::made_up::program;

#[test]
fn doctor_runs_on_any_machine() {
    let output = program().args(["doctor", "--json"]).output().unwrap();
    assert!(output.status.success());
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value["libtorch"].as_str().unwrap().starts_with("2.11.0"), "{value}");
    assert_eq!(value["cuda_available"].as_bool().unwrap(), value["cuda_problem"].is_null());
}

#[test]
fn an_installed_program_finds_libtorch() {
    let dir = tempfile::tempdir().unwrap();
    let installed = dir.path().join("cllm-eval");
    std::fs::copy(assert_cmd::cargo::cargo_bin("cllm-eval"), &installed).unwrap();
    let output = std::process::Command::new(&installed).arg("ls").env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn models_are_searched_in_the_cache_that_doctor_names() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().display().to_string();
    for (set, wanted) in [
        (["", "", &home], format!("{home}/huggingface/hub")),
        (["", &home, ""], format!("{home}/hub")),
        ([&home, "", ""], home.clone()),
    ] {
        let with = |arguments: &[&str]| {
            let names = ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"];
            program().envs(names.into_iter().zip(set)).args(arguments).output().unwrap()
        };
        let value: Value = serde_json::from_slice(&with(&["doctor", "--json"]).stdout).unwrap();
        assert_eq!(value["hub_cache"], wanted.as_str());
        #[cfg(not(feature = "hub"))]
        {
            let output = with(&["generate", "2 + 2?", "--model", "org/not-there"]);
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(message.contains(&format!("cache {wanted};")), "{message}");
        }
    }
}
