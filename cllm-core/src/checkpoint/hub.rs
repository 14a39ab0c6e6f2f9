//! Finds the folder of a model, by its path or by its id in the Hugging Face cache.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// PEFT's configuration of an adapter.
pub(super) const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// The folder of a model. `model` is a path, or an id such as `HuggingFaceTB/SmolLM2-135M-Instruct`
/// in the Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`). A build with the feature `hub` downloads
/// models that the cache lacks.
///
/// # Errors
/// When there is neither such a folder nor such a model in the cache; the message says where the
/// cache is.
pub fn locate(model: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(model);
    if folder.is_dir() {
        refuse_run(&folder)?;
        return Ok(folder);
    }
    if !model.contains('/') || !may_be_id(model) {
        return Err(Error::file(folder, "there is no such model folder"));
    }
    let cache = cache_folder();
    match find_snapshot(&cache, model) {
        Some(snapshot) => Ok(snapshot),
        None => download(model, &cache),
    }
}

/// Refuses the folder of a training run, whose model is in a folder of it.
fn refuse_run(folder: &Path) -> Result<()> {
    let is_model = |folder: &Path| folder.join("config.json").exists() || is_adapter(folder);
    if is_model(folder) {
        return Ok(());
    }
    match ["final", "checkpoints/best", "checkpoints/latest"]
        .map(|name| folder.join(name))
        .iter()
        .find(|path| is_model(path))
    {
        Some(model) => {
            let (run, model) = (folder.display(), model.display());
            let message = format!("is the folder of a run, not a model: name {model} or one of {run}/checkpoints/");
            Err(Error::file(folder, message))
        }
        None => Ok(()),
    }
}

/// `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `$XDG_CACHE_HOME/huggingface/hub`, else
/// `~/.cache/huggingface/hub`. Empty variables count as unset.
pub fn cache_folder() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user_cache =
        || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache"))).unwrap_or_default();
    variable("HF_HUB_CACHE")
        .or_else(|| Some(variable("HF_HOME")?.join("hub")))
        .unwrap_or_else(|| user_cache().join("huggingface/hub"))
}

/// Folder names that say where a model is stored, not which model it is.
const GENERIC_FOLDERS: [&str; 14] = [
    "/",
    ".",
    "..",
    "checkpoints",
    "final",
    "best",
    "latest",
    "last",
    "student",
    "teacher",
    "model",
    "models",
    "rounds",
    "runs",
];
/// Names that are just as generic when a number follows them.
const NUMBERED_FOLDERS: [&str; 4] = ["round", "step", "epoch", "checkpoint"];

/// What people call the model in a folder: its id on the Hugging Face Hub, or the last folder of its
/// path that says which model it is.
pub fn name(folder: &Path) -> String {
    let mut folders = folder.iter().rev().filter_map(|folder| folder.to_str());
    id(folder)
        .or_else(|| folders.find(|folder| is_descriptive(folder)).map(str::to_owned))
        .unwrap_or_else(|| "model".to_owned())
}

/// The id `owner/name` of a model in the Hugging Face cache, whose folder is
/// `models--owner--name/snapshots/…`; `None` for any other folder. The oldest models have no owner.
pub fn id(folder: &Path) -> Option<String> {
    let mut folders = folder.iter().filter_map(|folder| folder.to_str());
    folders.find_map(|folder| folder.strip_prefix("models--")).map(|id| id.replacen("--", "/", 1))
}

/// The tag of the cards that this toolkit writes.
pub const CARD_TAG: &str = "cllm";

/// The id on the Hub of the model in a folder, or of the model that the chain of fine-tunings here
/// began with. A card of another tool names what that model was made from, which is another model
/// than the one in the folder.
pub fn base_model(folder: &Path) -> Option<String> {
    id(folder).or_else(|| fine_tuned_from(folder).filter(|_| has_card_of_toolkit(folder)))
}

fn has_card_of_toolkit(folder: &Path) -> bool {
    let tags = front_matter(folder).and_then(|mut fields| fields.remove("tags"));
    tags.as_ref().and_then(Value::as_array).is_some_and(|tags| tags.iter().any(|tag| tag == CARD_TAG))
}

/// The id on the Hub of the model that one from elsewhere was fine-tuned from, as its card says. A
/// card of this toolkit names the model that the whole chain of them began with.
pub fn fine_tuned_from(folder: &Path) -> Option<String> {
    let named = || card_field(folder, "base_model").filter(|base| may_be_id(base));
    if id(folder).is_some() { None } else { named() }
}

/// The licence that the card in a model's folder names.
pub fn license(folder: &Path) -> Option<String> {
    card_field(folder, "license")
}

/// A field of the front matter of the card in a model's folder. The Hub also accepts lists; one of
/// several names does not tell which.
fn card_field(folder: &Path, key: &str) -> Option<String> {
    match front_matter(folder)?.remove(key)? {
        Value::Array(values) => <[Value; 1]>::try_from(values).ok()?[0].as_str().map(str::to_owned),
        value => value.as_str().map(str::to_owned),
    }
}

fn front_matter(folder: &Path) -> Option<Map<String, Value>> {
    let card = std::fs::read_to_string(folder.join("README.md")).ok()?;
    serde_saphyr::from_str(card.strip_prefix("---\n")?.split_once("\n---")?.0).ok()
}

/// Whether a name can be the id of a model on the Hub: `owner/name`, or the name alone of the oldest.
/// Cards of other tools may name a folder.
fn may_be_id(name: &str) -> bool {
    name.split('/').count() <= 2 && !name.starts_with(['.', '/', '~']) && !Path::new(name).is_dir()
}

fn is_descriptive(folder: &str) -> bool {
    let is_numbered = |kind: &&str| {
        let number = folder.strip_prefix(kind).map(|rest| rest.trim_start_matches(['-', '_']));
        number.is_some_and(|number| number.chars().all(|digit| digit.is_ascii_digit()))
    };
    !GENERIC_FOLDERS.contains(&folder) && !NUMBERED_FOLDERS.iter().any(is_numbered)
}

/// Whether a folder holds an adapter. As in `transformers`, it has precedence over a model in the
/// same folder.
pub fn is_adapter(folder: &Path) -> bool {
    folder.join(ADAPTER_CONFIG_FILE).exists()
}

/// The snapshot of a model in the cache that its `refs/main` names.
fn find_snapshot(cache: &Path, model: &str) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}", model.replace('/', "--")));
    let revision = std::fs::read_to_string(folder.join("refs/main")).ok()?;
    let snapshot = folder.join("snapshots").join(revision.trim());
    (snapshot.join("config.json").exists() || is_adapter(&snapshot)).then_some(snapshot)
}

#[cfg(feature = "hub")]
fn download(model: &str, cache: &Path) -> Result<PathBuf> {
    let failed = |error: hf_hub::api::sync::ApiError| Error::environment(format!("downloading `{model}`: {error}"));
    let api = hf_hub::api::sync::ApiBuilder::from_env().with_cache_dir(cache.to_owned()).build().map_err(failed)?;
    let repository = api.model(model.to_owned());
    for file in repository.info().map_err(failed)?.siblings {
        if crate::checksum::is_read(Path::new(&file.rfilename)) && !file.rfilename.contains('/') {
            repository.get(&file.rfilename).map_err(failed)?;
        }
    }
    find_snapshot(cache, model)
        .ok_or_else(|| Error::environment(format!("`{model}` was downloaded but has no config.json")))
}

#[cfg(not(feature = "hub"))]
fn download(model: &str, cache: &Path) -> Result<PathBuf> {
    Err(Error::usage(format!(
        "model `{model}`: there is neither such a folder nor such a model in the Hugging Face cache {}; download it there \
         first, or build with --features hub",
        cache.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_snapshot_is_located_by_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("models--org--name");
        let snapshot = model.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), "abc\n").unwrap();
        assert_eq!(find_snapshot(dir.path(), "org/name"), None);
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(find_snapshot(dir.path(), "org/name").as_ref(), Some(&snapshot));
        std::fs::rename(snapshot.join("config.json"), snapshot.join("adapter_config.json")).unwrap();
        assert_eq!(find_snapshot(dir.path(), "org/name"), Some(snapshot));
    }

    #[test]
    fn a_model_has_the_name_that_people_know_it_by() {
        for (folder, expected) in [
            ("/cache/models--org--name/snapshots/abc", "org/name"),
            ("/cache/models--gpt2/snapshots/abc", "gpt2"),
            ("models/SmolLM2-135M", "SmolLM2-135M"),
            ("runs/spider/student/final", "spider"),
            ("runs/sums/round-02/student/checkpoints/step-000300", "sums"),
            ("final", "model"),
        ] {
            assert_eq!(name(Path::new(folder)), expected, "{folder}");
        }
    }

    #[test]
    fn a_model_that_was_fine_tuned_here_has_the_base_and_the_license_that_its_card_names() {
        let dir = tempfile::tempdir().unwrap();
        let card = |front_matter: &str| {
            std::fs::write(dir.path().join("README.md"), format!("---\n{front_matter}\n---\n# A model\n")).unwrap();
            (fine_tuned_from(dir.path()), license(dir.path()))
        };
        let some = |name: &str| Some(name.to_owned());
        for (front_matter, expected) in [
            ("license: mit\nbase_model: org/base", (some("org/base"), some("mit"))),
            ("base_model:\n- org/base\nlicense: 'other' # see below", (some("org/base"), some("other"))),
            ("base_model: [org/a, org/b]\ntags:\n- license: mit", (None, None)),
            ("base_model: /home/me/base\nlicense: \"no\"", (None, some("no"))),
            ("base_model: runs/teacher/final", (None, None)),
            // A folder, since tests run in that of the crate.
            ("base_model: src/checkpoint", (None, None)),
            ("a: [", (None, None)),
        ] {
            assert_eq!(card(front_matter), expected, "{front_matter}");
        }
        // The card of another tool names another model than the one that is fine-tuned here.
        for (tags, expected) in
            [("", None), ("tags:\n- text", None), ("tags: cllm", None), ("tags:\n- text\n- cllm", some("org/base"))]
        {
            card(&format!("base_model: org/base\n{tags}"));
            assert_eq!(base_model(dir.path()), expected, "{tags}");
        }
        let cached = dir.path().join("models--org--tuned/snapshots/abc");
        std::fs::create_dir_all(&cached).unwrap();
        std::fs::write(cached.join("README.md"), "---\nbase_model: org/base\n---\n").unwrap();
        assert_eq!((base_model(&cached), fine_tuned_from(&cached)), (some("org/tuned"), None), "it is a base itself");
    }

    #[test]
    fn the_folder_of_a_run_is_refused_with_that_of_its_model() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().display().to_string();
        assert!(locate(&run).is_ok(), "loading says what an empty folder lacks");
        std::fs::create_dir(dir.path().join("final")).unwrap();
        std::fs::write(dir.path().join("final/config.json"), "{}").unwrap();
        let message = locate(&run).unwrap_err().to_string();
        assert!(message.contains("the folder of a run") && message.contains("/final"), "{message}");
        assert!(locate(&format!("{run}/final")).is_ok());
    }

    #[test]
    fn the_error_for_a_missing_model_says_where_it_was_looked_for() {
        assert!(locate("./nowhere/at/all").unwrap_err().to_string().contains("nowhere"));
        #[cfg(not(feature = "hub"))]
        assert!(locate("org/not-there").unwrap_err().to_string().contains("Hugging Face cache"));
    }
}
