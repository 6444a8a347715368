//! Tinker's routes, under `/api/v1`: what its SDK asks of its service. What is not here of it (copies between accounts,
//! billing, search) is answered 404, which the SDK expects of a server without it.

pub mod checkpoints;
pub mod futures;
pub mod hub;
pub mod sampling;
pub mod sessions;
pub mod training;

use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

pub fn documented() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(sessions::config))
        .routes(routes!(sessions::dynamic_config))
        .routes(routes!(sessions::capabilities))
        .routes(routes!(sessions::healthz))
        .routes(routes!(sessions::telemetry))
        .routes(routes!(sessions::create))
        .routes(routes!(sessions::heartbeat))
        .routes(routes!(sessions::finish))
        .routes(routes!(sessions::list))
        .routes(routes!(sessions::retrieve))
        .routes(routes!(futures::retrieve))
        .routes(routes!(training::create))
        .routes(routes!(training::info))
        .routes(routes!(training::forward_backward))
        .routes(routes!(training::step))
        .routes(routes!(training::save))
        .routes(routes!(training::save_for_sampler))
        .routes(routes!(training::load))
        .routes(routes!(sampling::create))
        .routes(routes!(sampling::retrieve))
        .routes(routes!(sampling::sample))
        .routes(routes!(checkpoints::runs))
        .routes(routes!(checkpoints::run))
        .routes(routes!(checkpoints::all))
        .routes(routes!(checkpoints::of_run))
        .routes(routes!(checkpoints::delete))
        .routes(routes!(checkpoints::publish, checkpoints::unpublish))
        .routes(routes!(checkpoints::ttl))
        .routes(routes!(checkpoints::info))
        .routes(routes!(hub::model))
        .routes(routes!(hub::model_of))
        .routes(routes!(hub::revision))
        .routes(routes!(hub::revision_of))
        .routes(routes!(hub::tree))
        .routes(routes!(hub::tree_of))
        .routes(routes!(hub::file))
        .routes(routes!(hub::file_of))
}
