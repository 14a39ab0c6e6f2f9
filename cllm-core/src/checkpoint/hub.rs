//! Finds a model by its folder, or by an id in the Hugging Face cache.

use std::path::{Path, PathBuf};

use super::is_adapter;
use crate::{Error, Result};

/// The folder of the model that `name` means: a folder, or an id such as `HuggingFaceTB/SmolLM2-135M-Instruct`
/// found in the Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`), downloaded first where the feature `hub` is built in.
///
/// # Errors
/// When there is no such folder and no such cached model; says where it looked.
pub fn locate(name: &str) -> Result<PathBuf> {
    let folder = PathBuf::from(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    let is_id = name.split('/').count() == 2 && !name.starts_with(['.', '/']);
    if !is_id {
        return Err(Error::file(folder, "there is no such model folder"));
    }
    let cache = cache_folder();
    if let Some(snapshot) = cached(&cache, name) {
        return Ok(snapshot);
    }
    download(name, &cache)
}

/// `HF_HUB_CACHE`, else `$HF_HOME/hub`, else `$XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`; a variable
/// that is empty is not set.
pub fn cache_folder() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache"))).unwrap_or_default();
    variable("HF_HUB_CACHE")
        .or_else(|| Some(variable("HF_HOME")?.join("hub")))
        .unwrap_or_else(|| cache().join("huggingface/hub"))
}

/// The snapshot that `refs/main` of a cached model names.
fn cached(cache: &Path, name: &str) -> Option<PathBuf> {
    let model = cache.join(format!("models--{}", name.replace('/', "--")));
    let revision = std::fs::read_to_string(model.join("refs/main")).ok()?;
    let snapshot = model.join("snapshots").join(revision.trim());
    (snapshot.join("config.json").exists() || is_adapter(&snapshot)).then_some(snapshot)
}

#[cfg(feature = "hub")]
fn download(name: &str, cache: &Path) -> Result<PathBuf> {
    let failed = |error: hf_hub::api::sync::ApiError| Error::environment(format!("downloading `{name}`: {error}"));
    let api = hf_hub::api::sync::ApiBuilder::from_env().with_cache_dir(cache.to_owned()).build().map_err(failed)?;
    let model = api.model(name.to_owned());
    for file in model.info().map_err(failed)?.siblings {
        let wanted = [".json", ".safetensors", ".jinja"].iter().any(|end| file.rfilename.ends_with(end));
        if wanted && !file.rfilename.contains('/') {
            model.get(&file.rfilename).map_err(failed)?;
        }
    }
    cached(cache, name).ok_or_else(|| Error::environment(format!("`{name}` was downloaded but has no config.json")))
}

#[cfg(not(feature = "hub"))]
fn download(name: &str, cache: &Path) -> Result<PathBuf> {
    Err(Error::usage(format!(
        "model `{name}`: there is no such folder, and no such model in the Hugging Face cache {}; download it there \
         first, or build with --features hub",
        cache.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_snapshot_is_found_by_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("models--org--name");
        let snapshot = model.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), "abc\n").unwrap();
        assert_eq!(cached(dir.path(), "org/name"), None);
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(cached(dir.path(), "org/name").as_ref(), Some(&snapshot));
        std::fs::rename(snapshot.join("config.json"), snapshot.join("adapter_config.json")).unwrap();
        assert_eq!(cached(dir.path(), "org/name"), Some(snapshot));
    }

    #[test]
    fn what_is_not_there_says_where_it_looked() {
        assert!(locate("./nowhere/at/all").unwrap_err().to_string().contains("nowhere"));
        #[cfg(not(feature = "hub"))]
        assert!(locate("org/not-there").unwrap_err().to_string().contains("Hugging Face cache"));
    }
}
