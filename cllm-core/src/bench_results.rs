//! Files of measurements: several models, one machine.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::environment::{Hardware, Toolkit};
use crate::{Error, Result, atomic_file, text_file};

/// Version of the file.
const SCHEMA_VERSION: u32 = 1;

/// Figures of one model.
pub trait BenchRecord: Serialize + DeserializeOwned {
    /// What the model is called; a file holds each name once.
    fn name(&self) -> &str;
}

/// The file: models measured on one machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BenchResults<M> {
    /// Version of this file's form.
    pub schema_version: u32,
    /// Where.
    pub hardware: Hardware,
    /// With what.
    pub toolkit: Toolkit,
    /// Per model.
    pub models: Vec<M>,
}

impl<M: BenchRecord> BenchResults<M> {
    /// What the file holds already, or a new one for measurements on `device`. Its folder is made.
    ///
    /// # Errors
    /// A file of another kind, machine or build.
    pub fn open(path: &Path, device: Device) -> Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
        }
        let (hardware, toolkit) = (Hardware::detect(device), Toolkit::current());
        if !path.exists() {
            return Ok(BenchResults { schema_version: SCHEMA_VERSION, hardware, toolkit, models: Vec::new() });
        }
        let found: BenchResults<M> = serde_json::from_str(&text_file::read(path)?)
            .map_err(|error| Error::file(path, format!("is no result of bench ({error}); choose another output")))?;
        if found.schema_version != SCHEMA_VERSION || found.hardware != hardware || found.toolkit != toolkit {
            let message =
                "holds figures of another machine or build, which are not put beside these; choose another output";
            return Err(Error::file(path, message));
        }
        Ok(found)
    }

    /// Puts a model's figures into the file, in the place of earlier ones of the same name.
    ///
    /// # Errors
    /// File-system errors.
    pub fn put(&mut self, path: &Path, figures: M) -> Result<()> {
        self.models.retain(|other| other.name() != figures.name());
        self.models.push(figures);
        atomic_file::write_json(path, self)
    }
}
