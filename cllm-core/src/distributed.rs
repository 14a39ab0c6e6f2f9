//! Processes that train together, started by torchrun, Slurm or whatever sets the usual variables.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use crate::cuda::collectives::{Collectives, Rendezvous};
use crate::{Error, Result};

/// How long a process waits for the others, to begin and in every collective.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// Who this process is among the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessEnv {
    /// Its number, from 0.
    pub rank: usize,
    /// Number of processes.
    pub world_size: usize,
    /// Its number on this machine: the GPU that it takes.
    pub local_rank: usize,
    rendezvous: Rendezvous,
}

/// This process and the others, if there are any. Alone, every collective is nothing.
pub struct ProcessGroup {
    rank: usize,
    world_size: usize,
    others: Option<Collectives>,
}

impl ProcessEnv {
    /// What the environment says: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them, or Slurm's
    /// SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID with MASTER_ADDR and MASTER_PORT. `None` for a process that is alone.
    ///
    /// # Errors
    /// [`Error::Usage`] naming a variable that is missing or no number in its range.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let names = if get("WORLD_SIZE").is_some() {
            ["WORLD_SIZE", "RANK", "LOCAL_RANK"]
        } else if get("SLURM_STEP_NUM_TASKS").is_some() {
            // Of srun; a batch script alone has the other variables too, but is one process.
            ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"]
        } else {
            return Ok(None);
        };
        let lacking =
            |name: &str| Error::usage(format!("{name} is not set, though {} is: see docs/distributed.md", names[0]));
        let number = |name: &str, most: usize| {
            let text = get(name).ok_or_else(|| lacking(name))?;
            let wrong = || Error::usage(format!("{name} is `{text}`: expected a number up to {most}"));
            text.parse().ok().filter(|number| *number <= most).ok_or_else(wrong)
        };
        let world_size = number(names[0], 1 << 20)?;
        if world_size <= 1 {
            return Ok(None);
        }
        let rank = number(names[1], world_size - 1)?;
        let local_rank = match get(names[2]) {
            Some(_) => number(names[2], world_size - 1)?,
            None => rank,
        };
        // torchrun's agent keeps the store, and starts anew with other keys.
        let agent = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
        let attempt = get("TORCHELASTIC_RESTART_COUNT").unwrap_or_else(|| "0".to_owned());
        let rendezvous = Rendezvous {
            host: get("MASTER_ADDR").ok_or_else(|| lacking("MASTER_ADDR"))?,
            port: number("MASTER_PORT", usize::from(u16::MAX))? as u16,
            serves: rank == 0 && !agent,
            prefix: format!("/cllm/attempt_{attempt}"),
        };
        Ok(Some(ProcessEnv { rank, world_size, local_rank, rendezvous }))
    }
}

impl ProcessGroup {
    /// A process alone.
    pub fn single() -> Self {
        ProcessGroup { rank: 0, world_size: 1, others: None }
    }

    /// Meets the other processes: over NCCL where `device` is a GPU, else over Gloo.
    ///
    /// # Errors
    /// [`Error::Usage`] where they cannot be met in time.
    pub fn join(member: &ProcessEnv, device: Device) -> Result<Self> {
        let gpu = if let Device::Cuda(index) = device { Some(index) } else { None };
        let ProcessEnv { rank, world_size, rendezvous, .. } = member;
        let others = Collectives::new(rendezvous, *rank, *world_size, gpu, TIMEOUT).map_err(|error| {
            let place = format!("MASTER_ADDR={} MASTER_PORT={}", rendezvous.host, rendezvous.port);
            Error::usage(format!("process {rank} of {world_size} cannot meet the others at {place}: {error}"))
        })?;
        Ok(ProcessGroup { rank: *rank, world_size: *world_size, others: Some(others) })
    }

    /// Number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of processes.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Whether this process is the one that writes.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// The sum over all processes, in place. Tensors are contiguous and on the group's device, here and below.
    ///
    /// # Errors
    /// [`Error::Negative`] where a process is gone, here and below.
    pub fn all_reduce(&self, values: &Tensor) -> Result<()> {
        self.each(|others| others.all_reduce(values))
    }

    /// This process's part `[count]` of the sum over all processes of `values [world x count]`.
    pub fn reduce_scatter(&self, values: &Tensor) -> Result<Tensor> {
        let part = self.shard(values);
        if self.world_size > 1 {
            let sum = part.f_empty_like()?;
            self.each(|others| others.reduce_scatter(&sum, values))?;
            return Ok(sum);
        }
        Ok(part)
    }

    /// Makes `values [world x count]` hold every process's own part of it.
    pub fn all_gather(&self, values: &Tensor) -> Result<()> {
        // Gloo wants the part elsewhere.
        self.each(|others| others.all_gather(values, &self.shard(values).copy()))
    }

    /// The values of process `root`, in place.
    pub fn broadcast_tensor(&self, values: &Tensor, root: usize) -> Result<()> {
        self.each(|others| others.broadcast(values, root))
    }

    /// What the process that writes has, for all.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn broadcast<T: Serialize + DeserializeOwned>(&self, value: T, device: Device) -> Result<T> {
        if self.world_size == 1 {
            return Ok(value);
        }
        let broken = |error: serde_json::Error| Error::negative(format!("what processes share: {error}"));
        let text = serde_json::to_vec(&value).map_err(broken)?;
        let length = Tensor::from_slice(&[text.len() as i64]).to_device(device);
        self.broadcast_tensor(&length, 0)?;
        let length = length.int64_value(&[0]);
        let mut bytes = Tensor::zeros([length], (Kind::Uint8, device));
        if self.is_main() {
            bytes = Tensor::from_slice(&text).to_device(device);
        }
        self.broadcast_tensor(&bytes, 0)?;
        let text = Vec::<u8>::try_from(bytes.to_device(Device::Cpu))?;
        serde_json::from_slice(&text).map_err(broken)
    }

    /// Waits for all processes.
    pub fn barrier(&self, device: Device) -> Result<()> {
        let one = Tensor::ones([1], (Kind::Float, device));
        self.all_reduce(&one)?;
        let _ = one.f_double_value(&[0])?;
        Ok(())
    }

    /// This process's part of `values [world x count]`.
    pub fn shard(&self, values: &Tensor) -> Tensor {
        let count = values.size()[0] / self.world_size as i64;
        values.narrow(0, self.rank as i64 * count, count)
    }

    fn each(&self, collective: impl FnOnce(&Collectives) -> Result<()>) -> Result<()> {
        let Some(others) = &self.others else { return Ok(()) };
        collective(others).map_err(|error| {
            let who = format!("process {} of {}", self.rank, self.world_size);
            Error::negative(format!("{who}: the others did not answer; one of them has ended or hangs: {error}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(variables: &[(&str, &str)]) -> Result<Option<ProcessEnv>> {
        ProcessEnv::from_env(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_environment_names_a_process_or_the_error_names_the_variable() {
        assert_eq!(member(&[]).unwrap(), None);
        assert_eq!(member(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
        let place = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];
        let torchrun = [&place[..], &[("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")]].concat();
        let found = member(&torchrun).unwrap().unwrap();
        assert_eq!((found.rank, found.world_size, found.local_rank, found.rendezvous.serves), (3, 4, 1, false));
        let agent =
            [&place[..], &[("WORLD_SIZE", "2"), ("RANK", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert!(!member(&agent).unwrap().unwrap().rendezvous.serves);
        let slurm =
            [&place[..], &[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")]].concat();
        let found = member(&slurm).unwrap().unwrap();
        assert!(found.rendezvous.serves && found.rendezvous.host == "node7" && found.rendezvous.port == 29500);
        let error = |variables: &[(&str, &str)]| member(variables).unwrap_err().to_string();
        assert!(error(&[("WORLD_SIZE", "2")]).contains("RANK is not set"));
        assert!(error(&[("WORLD_SIZE", "2"), ("RANK", "2")]).contains("RANK is `2`: expected a number up to 1"));
        assert!(error(&[("WORLD_SIZE", "2"), ("RANK", "0")]).contains("MASTER_"));
        assert!(
            error(&[&place[..1], &[("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_PORT", "x")]].concat()).contains("`x`")
        );
    }
}
