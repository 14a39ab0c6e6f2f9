//! The manifest: which shards a data set has, how it was made, and whether it is complete.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use jiff::civil::Date;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::schema::SCHEMA_VERSION;
use crate::chat_template::RenderingRecord;
use crate::checksum::{self, Checksum};
use crate::settings::{change, written};
use crate::thought::ThoughtClosing;
use crate::{Error, Result, atomic_file, fingerprint, output_folder, parquet_file, text_file};

pub(super) const MANIFEST: &str = "manifest.json";
/// Folder of the shards in that of the data set. It holds nothing else, so that tools which open a
/// folder of Parquet files can open it.
pub(super) const SHARD_FOLDER: &str = "data";

/// Clause about a data set whose manifest says that it is not complete.
pub const INCOMPLETE_DATA_SET: &str = "is not complete: the run that writes it was stopped or is still running; run the same \
                                       command (collect, augment, clean or import) again to finish it";

const MANIFEST_ADVICE: &str = "copy it again, or delete the data set's folder and collect again";
const UNLISTED_ADVICE: &str = "copy the manifest.json again, or move the file out of the folder";

/// More than any data set has of anything.
pub(super) const MAX_NUMBER: usize = 1 << 40;

/// How a data set was made. It is in the manifest and in the metadata of every shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Fingerprint of the teacher's config and weights.
    pub teacher: String,
    /// What people call the teacher: its id on the Hugging Face Hub, or the name of its folder; absent
    /// in data sets of earlier versions. It is not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_name: Option<String>,
    /// The id on the Hub of the model that the teacher was fine-tuned from; absent if the teacher is
    /// from there itself, or nothing is known. It is not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_base: Option<String>,
    /// Fingerprint of its tokenizer.
    pub tokenizer: String,
    /// Size of the teacher's vocabulary.
    pub vocab_size: usize,
    /// Tokens per block.
    pub n: usize,
    pub max_new_tokens: usize,
    /// `max_thinking_tokens` and the `closing_ids` of thoughts that reached it; absent without a
    /// limit.
    #[serde(flatten)]
    pub thought_closing: Option<ThoughtClosing>,
    /// Token ids that end a response.
    pub eos_ids: Vec<i32>,
    /// Seed of the first draft tokens.
    pub seed: u64,
    /// Fingerprint of the prompt file's contents.
    pub prompts: String,
    /// How the prompts were rendered.
    #[serde(flatten)]
    pub rendering: RenderingRecord,
    /// Version of the toolkit that collected the data set.
    pub toolkit: String,
    /// The runs of `collect`, `augment` and `clean` that made the data set, in order.
    pub steps: Vec<String>,
}

/// The contents of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema_version: u32,
    pub provenance: Provenance,
    /// In the order of their rows.
    pub shards: Vec<ShardEntry>,
    /// That of the rows that a stopped run saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_rows: Option<Checksum>,
    /// Whether the run that writes the data set has ended.
    pub complete: bool,
}

/// A shard in a manifest: `[name, rows, checksum]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "StoredEntry", into = "StoredEntry")]
pub struct ShardEntry {
    /// Path relative to the folder of the manifest.
    pub name: String,
    pub num_rows: usize,
    /// `None` for a shard that an earlier version or another program wrote.
    pub checksum: Option<Checksum>,
}

/// The two forms of a [`ShardEntry`]; earlier versions wrote the second.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StoredEntry {
    Checked(String, usize, Checksum),
    Unchecked(String, usize),
}

impl From<StoredEntry> for ShardEntry {
    fn from(stored: StoredEntry) -> Self {
        match stored {
            StoredEntry::Checked(name, num_rows, checksum) => ShardEntry { name, num_rows, checksum: Some(checksum) },
            StoredEntry::Unchecked(name, num_rows) => ShardEntry { name, num_rows, checksum: None },
        }
    }
}

impl From<ShardEntry> for StoredEntry {
    fn from(ShardEntry { name, num_rows, checksum }: ShardEntry) -> Self {
        match checksum {
            Some(checksum) => StoredEntry::Checked(name, num_rows, checksum),
            None => StoredEntry::Unchecked(name, num_rows),
        }
    }
}

const TEACHER_NAME: &str = "teacher_name";
/// Fields that depend on where the teacher is and on what stands beside it.
const NOT_COMPARED: [&str; 2] = [TEACHER_NAME, "teacher_base"];

/// The first field in which two provenances differ.
pub(super) struct Difference {
    pub(super) field: String,
    pub(super) existing: Value,
    pub(super) expected: Value,
}

impl Provenance {
    /// What decides the rows, and so stands in their shards and counts for their fingerprint: a name
    /// depends on where the teacher is.
    pub(super) fn of_rows(&self) -> Self {
        Provenance { teacher_name: None, teacher_base: None, ..self.clone() }
    }

    /// What in it no run of the toolkit writes.
    pub fn problem(&self) -> Option<String> {
        let Provenance { n, vocab_size, max_new_tokens, .. } = *self;
        let numbers = [("n", n), ("vocab_size", vocab_size), ("max_new_tokens", max_new_tokens)];
        let (name, number) = numbers.into_iter().find(|(_, number)| !(1..=MAX_NUMBER).contains(number))?;
        Some(format!("says {name}={number}: expected a number from 1 to {MAX_NUMBER}"))
    }

    pub(super) fn difference(&self, expected: &Provenance) -> Option<Difference> {
        let (existing, expected) = (json!(self), json!(expected));
        let mut fields = expected.as_object()?.keys().chain(existing.as_object()?.keys());
        let field =
            fields.find(|field| !NOT_COMPARED.contains(&field.as_str()) && existing[*field] != expected[*field])?;
        // Of two models, the names say more than the fingerprints.
        let shown = if field == "teacher" { TEACHER_NAME } else { field };
        Some(Difference { field: field.clone(), existing: existing[shown].clone(), expected: expected[shown].clone() })
    }
}

/// A clause about the existing data set, such as `was started with n=8; this command says 4`.
impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { field, existing, expected } = self;
        match field.as_str() {
            "teacher" if existing == expected || existing.is_null() => {
                write!(out, "was collected from another teacher, or this one has changed since")
            }
            "teacher" => {
                write!(out, "was collected from another teacher ({}, not {})", written(existing), written(expected))
            }
            "tokenizer" => write!(out, "was collected with another tokenizer"),
            "prompts" => write!(out, "was collected from other prompts"),
            "chat_template" => write!(out, "was rendered with another chat template"),
            "toolkit" => {
                write!(
                    out,
                    "was started by version {} of this toolkit; this is {}",
                    written(existing),
                    written(expected)
                )
            }
            "steps" => match changed_setting(existing, expected) {
                Some(change) => write!(out, "{change}"),
                None => write!(out, "was made in other steps ({existing}, not {expected})"),
            },
            setting => write!(out, "{}", change("was started", setting, existing, expected)),
        }
    }
}

/// The first setting in which two lists of steps differ, as a clause; `None` if they differ in
/// another way than in a step that is written `VERB: {SETTINGS}`.
fn changed_setting(existing: &Value, expected: &Value) -> Option<String> {
    let mut pairs = existing.as_array()?.iter().zip(expected.as_array()?);
    let (existing, expected) = pairs.find(|(existing, expected)| existing != expected)?;
    let (verb, existing) = existing.as_str()?.split_once(": ")?;
    let expected = expected.as_str()?.strip_prefix(verb)?.strip_prefix(": ")?;
    let settings = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
    let (existing, expected) = (settings(existing)?, settings(expected)?);
    let of = |settings: &Map<String, Value>, key: &str| settings.get(key).cloned().unwrap_or_default();
    let key = expected.keys().chain(existing.keys()).find(|key| of(&existing, key) != of(&expected, key))?;
    Some(change(&format!("was made by {verb}"), key, &of(&existing, key), &of(&expected, key)))
}

impl Manifest {
    /// Number of rows in all shards.
    pub fn num_rows(&self) -> usize {
        self.shards.iter().map(|shard| shard.num_rows).sum()
    }

    /// Whether `folder` has a manifest.
    pub(super) fn exists(folder: &Path) -> bool {
        folder.join(MANIFEST).exists()
    }

    /// Reads the manifest of `folder`, if it has one.
    pub(super) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MANIFEST);
        if !path.exists() {
            return Ok(None);
        }
        let text = text_file::read(&path)?;
        let manifest: Manifest =
            serde_json::from_str(&text).map_err(|error| Error::file(&path, format!("is not a manifest: {error}")))?;
        match manifest.problem() {
            Some(problem) => Err(Error::file(&path, format!("{problem}; {MANIFEST_ADVICE}"))),
            None => Ok(Some(manifest)),
        }
    }

    /// What in it no run of the toolkit writes.
    fn problem(&self) -> Option<String> {
        if self.schema_version != SCHEMA_VERSION {
            let version = self.schema_version;
            return Some(format!(
                "has schema version {version}; this version ({}) reads {SCHEMA_VERSION}",
                crate::VERSION
            ));
        }
        if let Some(problem) = self.provenance.problem() {
            return Some(problem);
        }
        let mut names = BTreeSet::new();
        for ShardEntry { name, num_rows, .. } in &self.shards {
            if !checksum::is_inside(Path::new(name)) {
                return Some(format!("names the shard `{name}`, which is outside of the data set's folder"));
            }
            if !names.insert(name) {
                return Some(format!("names the shard `{name}` twice"));
            }
            if *num_rows > MAX_NUMBER {
                return Some(format!("says that `{name}` has {num_rows} rows"));
            }
        }
        None
    }

    /// Reads the manifest of a data set, which several processes may have collected: then the
    /// manifests of their folders are joined.
    pub(super) fn load(folder: &Path) -> Result<Self> {
        match Manifest::read(folder)? {
            Some(manifest) => manifest.with_shards_in(folder),
            None => Manifest::join_ranks(folder)?.ok_or_else(|| {
                let message = "has no manifest.json, so it is not a trajectory data set; if another program wrote its \
                               Parquet files, copy the manifest.json of the data set that their rows come from into it";
                Error::file(folder, message)
            }),
        }
    }

    /// Reads the manifest that goes with a file: beside it, or beside its folder of shards.
    pub(super) fn beside(file: &Path) -> Result<Option<Self>> {
        let Some(folder) = file.parent() else { return Ok(None) };
        match (Manifest::read(folder)?, folder.parent()) {
            (None, Some(above)) if folder.ends_with(SHARD_FOLDER) => Manifest::read(above),
            (manifest, _) => Ok(manifest),
        }
    }

    /// The entry of a shard beside or below which this manifest stands.
    pub(super) fn entry_of(&self, shard: &Path) -> Option<&ShardEntry> {
        self.shards.iter().find(|entry| shard.ends_with(&entry.name))
    }

    /// Compares the shards of a complete data set with those in its folder. Another program that wrote
    /// the rows again gave its files other names: where no shard exists, the Parquet files in the folder
    /// are the shards. Where one does, all of them must be the manifest's.
    fn with_shards_in(mut self, folder: &Path) -> Result<Self> {
        if !self.complete {
            return Ok(self);
        }
        let mut names = parquet_names(folder, SHARD_FOLDER)?;
        if self.shards.iter().any(|shard| folder.join(&shard.name).exists()) {
            let listed: BTreeSet<&str> = self.shards.iter().map(|shard| shard.name.as_str()).collect();
            names.retain(|name| !listed.contains(name.as_str()));
            return match names.first() {
                Some(unknown) => {
                    let message = format!("does not list the shard {unknown}: {UNLISTED_ADVICE}");
                    Err(Error::file(folder.join(MANIFEST), message))
                }
                None => Ok(self),
            };
        }
        names.extend(parquet_names(folder, "")?);
        names.sort();
        if !names.is_empty() {
            let shard = |name: String| {
                let num_rows = parquet_file::num_rows(&folder.join(&name))?;
                Ok(ShardEntry { name, num_rows, checksum: None })
            };
            self.shards = names.into_iter().map(shard).collect::<Result<_>>()?;
        }
        Ok(self)
    }

    /// Joins the manifests of the folders of all ranks; `None` if there are no such folders.
    fn join_ranks(folder: &Path) -> Result<Option<Self>> {
        let world_sizes = world_sizes(folder)?;
        let Some(&world_size) = world_sizes.first() else { return Ok(None) };
        if world_sizes.len() > 1 {
            let message =
                format!("holds folders of runs of {world_sizes:?} processes: keep those of one run, delete the others");
            return Err(Error::file(folder, message));
        }
        let mut joined: Option<Manifest> = None;
        for name in (0..world_size).map(|rank| rank_folder(rank, world_size)) {
            let path = folder.join(&name);
            let Some(manifest) = Manifest::read(&path)? else {
                let message = format!("is missing: the process that collects it was stopped; {INCOMPLETE_DATA_SET}");
                return Err(Error::file(path, message));
            };
            let mut manifest = manifest.with_shards_in(&path)?;
            manifest.shards.iter_mut().for_each(|shard| shard.name = format!("{name}/{}", shard.name));
            match &mut joined {
                None => joined = Some(manifest),
                Some(joined) => {
                    joined.shards.extend(manifest.shards);
                    joined.complete &= manifest.complete;
                }
            }
        }
        Ok(joined)
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        atomic_file::write_json(&folder.join(MANIFEST), self)
    }
}

/// The date on which the data set in `folder` was started, whether it is complete or not; `None` if
/// there is none. The processes of a collection all keep the first date that one of them stored.
///
/// # Errors
/// A manifest that cannot be read.
pub fn stored_date(folder: &Path) -> Result<Option<Date>> {
    let mut folders = vec![folder.to_owned()];
    if folder.is_dir() {
        let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?.flatten().map(|entry| entry.path());
        folders.extend(entries.filter(|path| Manifest::exists(path)));
    }
    let manifests = folders.iter().filter_map(|folder| Manifest::read(folder).transpose());
    let dates = manifests.map(|manifest| Ok(manifest?.provenance.rendering.date)).collect::<Result<Vec<_>>>()?;
    Ok(dates.into_iter().flatten().min())
}

/// Names, relative to `folder`, of the Parquet files in one of its folders.
fn parquet_names(folder: &Path, inside: &str) -> Result<Vec<String>> {
    let path = folder.join(inside);
    if !path.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(&path).map_err(Error::io(&path))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let relative = |name: String| if inside.is_empty() { name } else { format!("{inside}/{name}") };
    Ok(names.filter(|name| name.ends_with(".parquet")).map(relative).collect())
}

/// The numbers of processes, more than one, by which a folder holds collections.
fn world_sizes(folder: &Path) -> Result<BTreeSet<usize>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.strip_prefix("rank-")?.split_once("-of-")?.1.parse().ok()).collect())
}

/// Checks that a data set may be written into a folder: that it is empty, or holds a data set, which
/// several processes may have collected.
///
/// # Errors
/// [`Error::File`] if it holds other files.
pub(super) fn expect_own_folder(folder: &Path) -> Result<()> {
    let is_data_set = || Manifest::exists(folder) || world_sizes(folder).is_ok_and(|sizes| !sizes.is_empty());
    output_folder::expect_own(folder, is_data_set)
}

/// Whether a folder holds a data set that has rows or is complete.
///
/// # Errors
/// A manifest that cannot be read.
pub fn holds_rows(folder: &Path) -> Result<bool> {
    Ok(Manifest::read(folder)?.is_some_and(|manifest| manifest.complete || !manifest.shards.is_empty()))
}

/// Checks that a collection by so many processes can begin or go on in a folder: each of them answers
/// a part of the prompts, so that another number would answer some of them again.
///
/// # Errors
/// [`Error::File`] if the folder holds a collection by another number of processes, or other files.
pub fn check_world_size(folder: &Path, world_size: usize) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    expect_own_folder(folder)?;
    let mut world_sizes = world_sizes(folder)?;
    if Manifest::exists(folder) {
        world_sizes.insert(1);
    }
    match world_sizes.into_iter().find(|&other| other != world_size) {
        Some(other) => {
            let processes = if other == 1 { "process" } else { "processes" };
            let message = format!(
                "holds a collection by {other} {processes}: start {other} again, or choose another output folder"
            );
            Err(Error::file(folder, message))
        }
        None => Ok(()),
    }
}

/// Name of the folder in which process `rank` of `world_size` collects, inside the folder of the
/// data set.
pub fn rank_folder(rank: usize, world_size: usize) -> String {
    format!("rank-{rank}-of-{world_size}")
}

/// Fingerprint of a data set that does not read its rows: it covers the provenance and the name,
/// rows and bytes of each shard. For a single shard it is the fingerprint of the file.
///
/// # Errors
/// When the folder has no manifest, or a shard is missing.
pub fn fingerprint(path: &Path) -> Result<String> {
    if !path.is_dir() {
        return fingerprint::hash_files(&[path]);
    }
    let manifest = Manifest::load(path)?;
    let bytes = |shard: &ShardEntry| {
        let shard = path.join(&shard.name);
        Ok(std::fs::metadata(&shard).map_err(Error::io(&shard))?.len())
    };
    let bytes = manifest.shards.iter().map(bytes).collect::<Result<Vec<u64>>>()?;
    Ok(fingerprint::hash_bytes(json!([manifest.provenance.of_rows(), manifest.shards, bytes]).to_string().as_bytes()))
}
