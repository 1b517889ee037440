//! `stasis plugins new`: a crate for a plugin of one's own, which builds as it is and is meant to be changed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The files of the new crate. What stands between `@` in them is filled in.
const TEMPLATE: [(&str, &str); 5] = [
    ("Cargo.toml", include_str!("../../template/Cargo.toml.in")),
    ("build.rs", include_str!("../../template/build.rs.in")),
    ("record.proto", include_str!("../../template/record.proto.in")),
    ("src/lib.rs", include_str!("../../template/src/lib.rs.in")),
    ("src/tests.rs", include_str!("../../template/src/tests.rs.in")),
];

/// Where the plugin API's sources were when this program was built; they may be there no more.
const API_SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../plugin-api");

/// Why no crate was written.
#[derive(Debug, thiserror::Error)]
pub enum ScaffoldError {
    /// Not a name for a plugin.
    #[error(
        "{0:?} is no name for a plugin: lower-case letters, digits and single hyphens, beginning with a letter"
    )]
    Name(String),
    /// No plugin API there.
    #[error("there is no crate stasis-plugin-api in {} (--api-path names the directory of its Cargo.toml)", .0.display())]
    NoApi(PathBuf),
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Writes the crate `stasis-plugin-NAME` into `directory`, which must not exist. It depends on the plugin API at `api`; without
/// one, on the sources that this program was built from, if they are still there, or else on the published version.
pub fn scaffold(name: &str, directory: &Path, api: Option<&Path>) -> Result<(), ScaffoldError> {
    let well_formed =
        |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    if !name.split('-').all(well_formed) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(ScaffoldError::Name(name.to_owned()));
    }
    let api = match api {
        Some(path) => Some(api_at(path).ok_or_else(|| ScaffoldError::NoApi(path.to_owned()))?),
        None => api_at(Path::new(API_SOURCES)),
    };
    let api = match api {
        Some(path) => format!("path = {:?}", path.display().to_string()),
        None => format!("version = {:?}", super::loader::api_version()),
    };
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ScaffoldError::Write { path, source }
    };
    let source = directory.join("src");
    fs::create_dir(directory).map_err(failed(directory))?;
    fs::create_dir(&source).map_err(failed(&source))?;
    for (file, text) in TEMPLATE {
        let path = directory.join(file);
        let text =
            text.replace("@name@", name).replace("@ident@", &name.replace('-', "_")).replace("@api@", &api);
        fs::write(&path, text).map_err(failed(&path))?;
    }
    Ok(())
}

/// The absolute path of the plugin API, if it is there.
fn api_at(path: &Path) -> Option<PathBuf> {
    let manifest = fs::read_to_string(path.join("Cargo.toml")).ok()?;
    manifest.lines().any(|line| line == r#"name = "stasis-plugin-api""#).then(|| path.canonicalize().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sensible_names_are_taken() {
        for name in ["", "Upper", "a_b", "9to5", "a--b", "-a", "a-", "../up", "é"] {
            let error = scaffold(name, Path::new("/nonexistent/x"), None).unwrap_err();
            assert!(matches!(error, ScaffoldError::Name(_)), "{name}: {error}");
        }
        let error = scaffold("two-words", Path::new("/nonexistent/x"), None).unwrap_err();
        assert!(matches!(error, ScaffoldError::Write { .. }), "{error}");
        let error = scaffold("x", Path::new("/nonexistent/x"), Some(Path::new("/proc"))).unwrap_err();
        assert!(error.to_string().contains("stasis-plugin-api in /proc"), "{error}");
    }

    #[test]
    fn the_smallest_plugin_has_at_most_sixty_lines() {
        let (_, text) = TEMPLATE.iter().find(|(file, _)| *file == "src/lib.rs").unwrap();
        assert!(text.lines().count() <= 60);
    }
}
