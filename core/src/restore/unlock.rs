//! Giving an image up: what its dump kept outside for a restore goes.

use super::{
    RestoreOptions,
    error::{RestoreError, Result},
    host::RestoreHost,
    world::Plans,
};
use crate::plugins::{CallContext, HookWatch};
use stasis_plugin_api::Event;

/// Runs the Lifecycle hooks of the image's plugins. What is gone already is no error.
pub fn unlock(options: &RestoreOptions) -> Result<()> {
    let plans = Plans::new(options)?;
    let watch = HookWatch::new().map_err(RestoreError::system("map the hook status page"))?;
    for kind in plans.registry.lifecycles() {
        let (plans, plugin) = (&plans, &kind.plugin);
        let host = RestoreHost { plans, world: None, plugin, node: 0, pid: 0, outside: None, guardian: None };
        let context = CallContext { watch, host: &host, task: 0, task_name: "", resource: "Unlock" };
        context.event(kind, Event::Unlock)?;
    }
    Ok(())
}
