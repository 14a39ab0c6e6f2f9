//! The processes of a distributed run, started by torchrun, Slurm or any launcher that sets the
//! usual variables.

use std::fmt::Display;
use std::net::{TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tch::{Device, Kind, Tensor};

use crate::cuda::collectives::{Collectives, Work};
use crate::cuda::store::{Rendezvous, Store};
use crate::{Error, Result, interrupt};

mod peers;

pub use peers::run_together;

/// How long a process waits in a collective for others that live (see [`run_together`]): longer than
/// any validation and any checkpoint take.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(4 * 3600);
/// How long the first processes wait for the last one to start.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// How often processes that wait for others to start look for them, and for a signal.
const START_POLL: Duration = Duration::from_millis(100);
/// How long a machine may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// This process and its distributed run, as the environment variables describe them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessEnv {
    pub rank: usize,
    pub world_size: usize,
    /// Rank among the processes of this machine, and the index of the GPU that it uses.
    pub local_rank: usize,
    /// Number of processes on this machine; with Slurm, the most on any machine of the run.
    pub local_world_size: usize,
    rendezvous: Rendezvous,
}

impl ProcessEnv {
    /// Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun
    /// sets them, or Slurm's SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID and
    /// SLURM_STEP_TASKS_PER_NODE with MASTER_ADDR and MASTER_PORT. Without the fourth, all processes
    /// are on one machine. `None` for a single process.
    ///
    /// # Errors
    /// [`Error::Usage`] naming a variable that is missing or is not a number in its range.
    pub fn from_env(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let [world_size_name, rank_name, local_rank_name] = if get("WORLD_SIZE").is_some() {
            ["WORLD_SIZE", "RANK", "LOCAL_RANK"]
        } else if get("SLURM_STEP_NUM_TASKS").is_some() {
            // Only srun sets this variable. A batch script is a single process although it has
            // Slurm's other variables.
            ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"]
        } else {
            return Ok(None);
        };
        let missing =
            |name: &str| Error::usage(format!("{name} is not set, but {world_size_name} is: see docs/distributed.md"));
        let number = |name: &str, max: usize| {
            let text = get(name).ok_or_else(|| missing(name))?;
            let invalid = || Error::usage(format!("{name} is `{text}`: expected a number up to {max}"));
            text.parse().ok().filter(|number| *number <= max).ok_or_else(invalid)
        };
        let world_size = number(world_size_name, 1 << 20)?;
        if world_size <= 1 {
            return Ok(None);
        }
        let rank = number(rank_name, world_size - 1)?;
        let local_rank = match get(local_rank_name) {
            Some(_) => number(local_rank_name, world_size - 1)?,
            None => rank,
        };
        let local_world_size = match (get("LOCAL_WORLD_SIZE"), get("SLURM_STEP_TASKS_PER_NODE")) {
            (Some(_), _) => number("LOCAL_WORLD_SIZE", world_size)?,
            (None, Some(tasks)) if world_size_name == "SLURM_STEP_NUM_TASKS" => {
                max_tasks_per_node(&tasks).unwrap_or(world_size)
            }
            _ => world_size,
        };
        // torchrun's agent serves the store itself, and changes the keys when it restarts the
        // processes.
        let agent_serves = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|text| text == "True");
        let attempt = get("TORCHELASTIC_RESTART_COUNT").unwrap_or_else(|| "0".to_owned());
        let rendezvous = Rendezvous {
            host: get("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?,
            port: number("MASTER_PORT", usize::from(u16::MAX))? as u16,
            serves: rank == 0 && !agent_serves,
            prefix: format!("/cllm/attempt_{attempt}"),
        };
        Ok(Some(ProcessEnv { rank, world_size, local_rank, local_world_size, rendezvous }))
    }

    /// Waits until the store is served, unless this process serves it. The store itself would wait
    /// too, but for no signal, and with pages of messages.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::Usage`] if nobody serves it in time.
    fn wait_for_store(&self, timeout: Duration) -> Result<()> {
        let (started, Rendezvous { host, port, serves, .. }) = (Instant::now(), &self.rendezvous);
        if *serves {
            return Ok(());
        }
        while let Err(error) = reach(host, *port) {
            if started.elapsed() >= timeout {
                return Err(self.unreachable(&format!("{error} for {} s", timeout.as_secs())));
            }
            interrupt::check()?;
            thread::sleep(START_POLL);
        }
        Ok(())
    }

    /// Connects to the store of the run, and serves it if `serves`.
    fn connect(&self, serves: bool) -> Result<Store> {
        let rendezvous = Rendezvous { serves, ..self.rendezvous.clone() };
        Store::connect(&rendezvous, START_TIMEOUT).map_err(|error| self.unreachable(&error))
    }

    fn unreachable(&self, problem: &dyn Display) -> Error {
        let ProcessEnv { rank, world_size, rendezvous: Rendezvous { host, port, .. }, .. } = self;
        let advice = "start process 0, and check that both variables are the same for all";
        Error::usage(format!(
            "process {rank} of {world_size} cannot reach the others at MASTER_ADDR={host} MASTER_PORT={port}: {problem}: \
             {advice}"
        ))
    }
}

/// Connects to a port, of any of the addresses of a host, and hangs up.
fn reach(host: &str, port: u16) -> std::io::Result<()> {
    let mut problem = std::io::Error::new(std::io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(_) => return Ok(()),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

/// The largest number in Slurm's list of tasks per node, as in `4(x2),3`.
fn max_tasks_per_node(list: &str) -> Option<usize> {
    list.split(',').filter_map(|nodes| nodes.split('(').next()?.trim().parse().ok()).max()
}

/// The processes of a run. In a group of one, every collective does nothing.
///
/// Tensors given to collectives are contiguous and on the group's device, and every process calls
/// the same collectives in the same order.
pub struct ProcessGroup {
    rank: usize,
    world_size: usize,
    collectives: Option<Collectives>,
}

impl ProcessGroup {
    /// A group of one process.
    pub fn single() -> Self {
        ProcessGroup { rank: 0, world_size: 1, collectives: None }
    }

    /// Waits until all processes have joined, within [`run_together`]. They communicate over NCCL if
    /// `device` is a GPU, otherwise over Gloo.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn join(process: &ProcessEnv, device: Device) -> Result<Self> {
        let gpu = if let Device::Cuda(index) = device { Some(index) } else { None };
        let ProcessEnv { rank, world_size, .. } = *process;
        let store = process.connect(false)?;
        let collectives =
            Collectives::new(&store, rank, world_size, gpu, COLLECTIVE_TIMEOUT).map_err(|error| no_answer(&error))?;
        Ok(ProcessGroup { rank, world_size, collectives: Some(collectives) })
    }

    /// Frees the group once every process has called this. After an error nobody calls it: the
    /// others may wait for something else.
    pub fn leave(group: Rc<Self>) {
        if let Some(collectives) = Rc::into_inner(group).and_then(|group| group.collectives) {
            collectives.free();
        }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// Whether this is the process that writes files and prints.
    pub fn is_main(&self) -> bool {
        self.rank == 0
    }

    /// Replaces `values` with their sum over all processes.
    ///
    /// # Errors
    /// [`Error::Peer`] when another process has ended, here and below.
    pub fn all_reduce(&self, values: &Tensor) -> Result<()> {
        self.run(|collectives| collectives.all_reduce(values))
    }

    /// Sums `values [world_size * count]` over all processes and returns this process's shard
    /// `[count]` of the sum.
    pub fn reduce_scatter(&self, values: &Tensor) -> Result<Tensor> {
        let shard = self.shard(values);
        if self.world_size == 1 {
            return Ok(shard);
        }
        let sum = shard.f_empty_like()?;
        self.run(|collectives| collectives.reduce_scatter(&sum, values))?;
        Ok(sum)
    }

    /// Starts to make `values` of process `root` the sum over all processes; in the others they
    /// become anything. Nothing else uses them until [`Self::finish_reduce`].
    pub fn start_reduce(&self, values: &Tensor, root: usize) -> Result<PendingReduce> {
        let mut work = None;
        self.run(|collectives| {
            work = Some(collectives.start_reduce(values, root)?);
            Ok(())
        })?;
        Ok(PendingReduce(work))
    }

    /// Waits for sums: the device's current stream, or the thread on the CPU.
    pub fn finish_reduce(&self, PendingReduce(work): PendingReduce) -> Result<()> {
        self.run(|_| work.map_or(Ok(()), Work::wait))
    }

    /// Fills `values [world_size * count]` with every process's own shard of it.
    pub fn all_gather(&self, values: &Tensor) -> Result<()> {
        // Gloo needs the copy: its input must not overlap its output.
        self.run(|collectives| collectives.all_gather(values, &self.shard(values).copy()))
    }

    /// Replaces `values` with those of process `root`.
    pub fn broadcast_tensor(&self, values: &Tensor, root: usize) -> Result<()> {
        self.run(|collectives| collectives.broadcast(values, root))
    }

    /// The main process's `value`, on all processes.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn broadcast<T: Serialize + DeserializeOwned>(&self, value: T, device: Device) -> Result<T> {
        if self.world_size == 1 { Ok(value) } else { self.broadcast_from(0, &value, device) }
    }

    /// The values of all processes, by their ranks. Nobody gets them before all have called this.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn gather<T: Serialize + DeserializeOwned>(&self, value: T, device: Device) -> Result<Vec<T>> {
        if self.world_size == 1 {
            return Ok(vec![value]);
        }
        (0..self.world_size).map(|root| self.broadcast_from(root, &value, device)).collect()
    }

    fn broadcast_from<T: Serialize + DeserializeOwned>(&self, root: usize, value: &T, device: Device) -> Result<T> {
        let json = serde_json::to_vec(value).map_err(Error::serialization)?;
        let length = Tensor::from_slice(&[json.len() as i64]).to_device(device);
        self.broadcast_tensor(&length, root)?;
        let bytes = if self.rank == root {
            Tensor::from_slice(&json).to_device(device)
        } else {
            Tensor::zeros([length.int64_value(&[0])], (Kind::Uint8, device))
        };
        self.broadcast_tensor(&bytes, root)?;
        let json = Vec::<u8>::try_from(bytes.to_device(Device::Cpu))?;
        serde_json::from_slice(&json).map_err(|error| {
            Error::internal(format!("process {} cannot read what process {root} sent: {error}", self.rank))
        })
    }

    /// Waits until every process has called this.
    pub fn barrier(&self, device: Device) -> Result<()> {
        let one = Tensor::ones([1], (Kind::Float, device));
        self.all_reduce(&one)?;
        // Reading the value waits for NCCL, which returns before the work is done.
        let _ = one.f_double_value(&[0])?;
        Ok(())
    }

    /// This process's shard of `values [world_size * count]`, a view.
    pub fn shard(&self, values: &Tensor) -> Tensor {
        let count = values.size()[0] / self.world_size as i64;
        values.narrow(0, self.rank as i64 * count, count)
    }

    fn run(&self, collective: impl FnOnce(&Collectives) -> Result<()>) -> Result<()> {
        let Some(collectives) = &self.collectives else { return Ok(()) };
        collective(collectives).map_err(|error| no_answer(&error))
    }
}

/// Sums that [`ProcessGroup::start_reduce`] began; `None` in a single process.
pub struct PendingReduce(Option<Work>);

fn no_answer(error: &Error) -> Error {
    Error::Peer { exit_code: 3, message: format!("another process did not answer: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_variables(variables: &[(&str, &str)]) -> Result<Option<ProcessEnv>> {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        ProcessEnv::from_env(get)
    }

    #[test]
    fn the_environment_describes_the_process_or_the_error_names_the_variable() {
        assert_eq!(from_variables(&[]).unwrap(), None);
        assert_eq!(from_variables(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
        let address = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];
        let torchrun = [&address[..], &[("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1")]].concat();
        let process = from_variables(&torchrun).unwrap().unwrap();
        assert_eq!((process.rank, process.world_size, process.local_rank), (3, 4, 1));
        let local_world_size = |more: &[(&str, &str)]| {
            from_variables(&[&torchrun[..], more].concat()).map(|process| process.unwrap().local_world_size)
        };
        assert_eq!(local_world_size(&[]).unwrap(), 4, "one machine, unless the launcher says otherwise");
        assert_eq!(local_world_size(&[("LOCAL_WORLD_SIZE", "2")]).unwrap(), 2);
        assert!(local_world_size(&[("LOCAL_WORLD_SIZE", "5")]).is_err());
        assert!(!process.rendezvous.serves);
        let agent =
            [&address[..], &[("WORLD_SIZE", "2"), ("RANK", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert!(!from_variables(&agent).unwrap().unwrap().rendezvous.serves);
        let slurm =
            [&address[..], &[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "0"), ("SLURM_LOCALID", "0")]].concat();
        for (tasks, expected) in [("1(x2)", 1), ("2", 2), ("1,2(x3)", 2)] {
            let slurm = [&slurm[..], &[("SLURM_STEP_TASKS_PER_NODE", tasks)]].concat();
            assert_eq!(from_variables(&slurm).unwrap().unwrap().local_world_size, expected);
        }
        let Rendezvous { host, port, serves, .. } = from_variables(&slurm).unwrap().unwrap().rendezvous;
        assert!(serves && host == "node7" && port == 29500);
        let error = |variables: &[(&str, &str)]| from_variables(variables).unwrap_err().to_string();
        assert!(error(&[("WORLD_SIZE", "2")]).contains("RANK is not set"));
        assert!(error(&[("WORLD_SIZE", "2"), ("RANK", "2")]).contains("RANK is `2`: expected a number up to 1"));
        assert!(error(&[("WORLD_SIZE", "2"), ("RANK", "0")]).contains("MASTER_"));
        let bad_port = [&address[..1], &[("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_PORT", "x")]].concat();
        assert!(error(&bad_port).contains("`x`"));
    }

    /// The others say which process it was.
    #[test]
    fn an_error_for_want_of_an_answer_names_no_process() {
        let error = no_answer(&Error::environment("the connection is closed"));
        assert_eq!(error.to_string(), "another process did not answer: the connection is closed");
    }

    mod needs_gpu {
        use std::net::TcpListener;

        use super::*;

        #[test]
        #[ignore = "needs a GPU: scripts/test --gpu"]
        fn nccl_sums_and_frees_a_group_of_one() {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let rendezvous =
                Rendezvous { host: "127.0.0.1".to_owned(), port, serves: true, prefix: "/test".to_owned() };
            let process = ProcessEnv { rank: 0, world_size: 1, local_rank: 0, local_world_size: 1, rendezvous };
            let device = Device::Cuda(0);
            run_together(&process, || {
                let group = Rc::new(ProcessGroup::join(&process, device)?);
                let values = Tensor::ones([1 << 20], (Kind::BFloat16, device));
                let reduce = group.start_reduce(&values, 0)?;
                let others = Tensor::ones_like(&values) * 2.0;
                group.finish_reduce(reduce)?;
                for collective in [ProcessGroup::all_reduce, ProcessGroup::all_gather] {
                    collective(&group, &values)?;
                }
                group.broadcast_tensor(&values, 0)?;
                group.barrier(device)?;
                assert_eq!((&others - &values).sum(Kind::Float).double_value(&[]), f64::from(1 << 20));
                ProcessGroup::leave(group);
                Ok(())
            })
            .unwrap();
        }
    }
}
