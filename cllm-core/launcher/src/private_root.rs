//! A root folder of the process's own, in memory. It has only read-only views of what Python needs
//! and an empty /tmp, so that other files cannot even be named.

use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, chown, pivot_root};

/// The folder in it that the program may write to.
pub(super) const WRITABLE: &str = "/tmp";
const NONE: Option<&str> = None;

/// Mounts the root over `folder` and enters it; its files may have `bytes` in all. If that fails,
/// the process sees the same files as before.
pub(super) fn enter(folder: &Path, readable: &[PathBuf], bytes: u64, owner: (Uid, Gid)) -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    let size = format!("size={bytes},nr_inodes=4096,mode=755");
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(size.as_str()))?;
    let entered = fill(folder, readable, owner).and_then(|()| {
        std::env::set_current_dir(folder)?;
        pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        std::env::set_current_dir(WRITABLE)
    });
    if entered.is_err() {
        umount2(folder, MntFlags::MNT_DETACH)?;
    }
    entered
}

fn fill(root: &Path, readable: &[PathBuf], owner: (Uid, Gid)) -> std::io::Result<()> {
    let inside = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    for path in readable {
        let (target, kind) = (inside(path), std::fs::symlink_metadata(path)?.file_type());
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(path)?, &target)?;
        } else if kind.is_dir() {
            std::fs::create_dir_all(&target)?;
            bind(path, &target)?;
            make_read_only(&target)?;
        } else {
            std::fs::write(&target, "")?;
            bind(path, &target)?;
            // A device has no content to protect, and would not work.
            if kind.is_file() {
                make_read_only(&target)?;
            }
        }
    }
    let writable = inside(Path::new(WRITABLE));
    // Python itself may lie in there.
    std::fs::create_dir_all(&writable)?;
    Ok(chown(&writable, Some(owner.0), Some(owner.1))?)
}

fn bind(from: &Path, to: &Path) -> nix::Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
}

fn make_read_only(target: &Path) -> nix::Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(NONE, target, NONE, flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV, NONE)
}
