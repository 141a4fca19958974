//! Notes about what the agent changed on the machine, in files that outlive it: after kill -9 the
//! next agent knows what to take over or put back.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// One file: a value of type `T`, in an agent's own directory.
#[derive(Debug)]
pub(super) struct Note<T> {
    path: PathBuf,
    boot_id: String,
    value: PhantomData<T>,
}

#[derive(Serialize, Deserialize)]
struct Content<T> {
    /// Neither addresses nor NIC settings survive a reboot; a note of an earlier boot is void.
    boot_id: String,
    value: T,
}

impl<T: Serialize + DeserializeOwned + Default> Note<T> {
    /// The note about `subject`, and its value: the default where there is none.
    pub(super) fn open(state_directory: &Path, subject: &str) -> io::Result<(Self, T)> {
        let path = state_directory.join(format!("{subject}.json"));
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let note = Self { path, boot_id, value: PhantomData };
        let value = note.read()?.unwrap_or_default();
        Ok((note, value))
    }

    fn read(&self) -> io::Result<Option<T>> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match serde_json::from_slice::<Content<T>>(&text) {
            Ok(content) if content.boot_id == self.boot_id => Ok(Some(content.value)),
            Ok(_) => Ok(None),
            Err(error) => {
                // Written atomically, so someone else did this; not a reason to refuse to start.
                tracing::warn!(path = %self.path.display(), %error,
                    "ignoring a state file that cannot be understood");
                Ok(None)
            }
        }
    }

    /// Replaces the note atomically; on disk when this returns.
    pub(super) fn write(&self, value: &T) -> io::Result<()> {
        if let Some(directory) = self.path.parent() {
            fs::create_dir_all(directory)?;
        }
        let content = Content { boot_id: self.boot_id.clone(), value };
        let draft = self.path.with_extension("json.new");
        let mut file = File::create(&draft)?;
        serde_json::to_writer_pretty(&mut file, &content)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&draft, &self.path)
    }

    /// Removes the note: nothing is left to put back.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Numbers = Vec<u32>;

    #[test]
    fn a_note_outlives_its_writer() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("not/there/yet");
        let (note, value) = Note::<Numbers>::open(&below, "numbers").unwrap();
        assert_eq!(value, [0; 0]);
        note.write(&vec![1, 2]).unwrap();
        let (note, value) = Note::<Numbers>::open(&below, "numbers").unwrap();
        assert_eq!(value, [1, 2]);
        note.remove().unwrap();
        note.remove().unwrap();
        assert_eq!(fs::read_dir(&below).unwrap().count(), 0);
    }

    #[test]
    fn a_note_of_an_earlier_boot_is_void() {
        let directory = tempfile::tempdir().unwrap();
        let (mut note, _) = Note::<Numbers>::open(directory.path(), "numbers").unwrap();
        note.boot_id = "earlier".into();
        note.write(&vec![1]).unwrap();
        let (_, value) = Note::<Numbers>::open(directory.path(), "numbers").unwrap();
        assert_eq!(value, [0; 0]);
    }

    #[test]
    fn a_spoilt_note_is_ignored() {
        let directory = tempfile::tempdir().unwrap();
        let (note, _) = Note::<Numbers>::open(directory.path(), "numbers").unwrap();
        fs::write(&note.path, "{").unwrap();
        let (_, value) = Note::<Numbers>::open(directory.path(), "numbers").unwrap();
        assert_eq!(value, [0; 0]);
    }
}
