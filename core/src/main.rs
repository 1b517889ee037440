//! The binary: a thin face on the library.

fn main() -> std::process::ExitCode {
    stasis::cli::main()
}
