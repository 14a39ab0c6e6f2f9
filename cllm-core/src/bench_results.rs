//! The file that a `bench` verb writes: several models measured on one machine. Each run adds or
//! replaces one model. A file of another machine or build is refused, because its figures could not
//! be compared with the new ones.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::environment::{Hardware, Toolkit};
use crate::{Error, Result, atomic_file, text_file};

const SCHEMA_VERSION: u32 = 1;

/// The measurements of one model.
pub trait BenchRecord: Serialize + DeserializeOwned {
    /// Name of the model, unique in a file.
    fn name(&self) -> &str;
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BenchResults<M> {
    pub schema_version: u32,
    pub hardware: Hardware,
    pub toolkit: Toolkit,
    pub models: Vec<M>,
}

impl<M: BenchRecord> BenchResults<M> {
    /// Reads the results in `path`, or begins new ones for measurements on `device` and creates
    /// their folder.
    ///
    /// # Errors
    /// When the file is of another kind, machine or build.
    pub fn open(path: &Path, device: Device) -> Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
        }
        let (hardware, toolkit) = (Hardware::detect(device), Toolkit::current());
        if !path.exists() {
            return Ok(BenchResults { schema_version: SCHEMA_VERSION, hardware, toolkit, models: Vec::new() });
        }
        let results: BenchResults<M> = serde_json::from_str(&text_file::read(path)?)
            .map_err(|error| Error::file(path, format!("is not a bench result ({error}); choose another output")))?;
        if results.schema_version != SCHEMA_VERSION || results.hardware != hardware || results.toolkit != toolkit {
            let message =
                "holds results of another machine or build, which cannot be mixed with new ones; choose another output";
            return Err(Error::file(path, message));
        }
        Ok(results)
    }

    /// Adds a model, or replaces the one of the same name, and saves the file.
    ///
    /// # Errors
    /// File-system errors.
    pub fn put(&mut self, path: &Path, record: M) -> Result<()> {
        self.models.retain(|other| other.name() != record.name());
        self.models.push(record);
        atomic_file::write_json(path, self)
    }
}
