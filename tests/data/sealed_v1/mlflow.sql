BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('dc11669786a5');
CREATE TABLE "assessments" (
	assessment_id VARCHAR(50) NOT NULL, 
	trace_id VARCHAR(50) NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	assessment_type VARCHAR(20) NOT NULL, 
	value TEXT NOT NULL, 
	error TEXT, 
	created_timestamp BIGINT NOT NULL, 
	last_updated_timestamp BIGINT NOT NULL, 
	source_type VARCHAR(50) NOT NULL, 
	source_id VARCHAR(250), 
	run_id VARCHAR(32), 
	span_id VARCHAR(50), 
	rationale TEXT, 
	overrides VARCHAR(50), 
	valid BOOLEAN NOT NULL, 
	assessment_metadata TEXT, 
	experiment_id INTEGER, 
	trace_timestamp_ms BIGINT, 
	aggregate_value FLOAT, 
	is_numeric_value BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT assessments_pk PRIMARY KEY (assessment_id), 
	CONSTRAINT fk_assessments_trace_id FOREIGN KEY(trace_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE budget_policies (
	budget_policy_id VARCHAR(36) NOT NULL, 
	budget_unit VARCHAR(32) NOT NULL, 
	budget_amount FLOAT NOT NULL, 
	duration_unit VARCHAR(32) NOT NULL, 
	duration_value INTEGER NOT NULL, 
	target_scope VARCHAR(32) NOT NULL, 
	budget_action VARCHAR(32) NOT NULL, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, target_value VARCHAR(255), 
	CONSTRAINT budget_policies_pk PRIMARY KEY (budget_policy_id)
);
CREATE TABLE "datasets" (
	dataset_uuid VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(500) NOT NULL, 
	digest VARCHAR(36) NOT NULL, 
	dataset_source_type VARCHAR(36) NOT NULL, 
	dataset_source TEXT NOT NULL, 
	dataset_schema TEXT, 
	dataset_profile TEXT, 
	CONSTRAINT dataset_pk PRIMARY KEY (experiment_id, name, digest), 
	CONSTRAINT fk_datasets_experiment_id_experiments FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
INSERT INTO "datasets" VALUES('cc0836ea926947c28cada10dadbc930a',1,'repeats','dddddddddddddddddddddddddddddddd','patchbay','{"digest": "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"}',NULL,NULL);
CREATE TABLE endpoint_bindings (
	endpoint_id VARCHAR(36) NOT NULL, 
	resource_type VARCHAR(50) NOT NULL, 
	resource_id VARCHAR(255) NOT NULL, 
	created_at BIGINT NOT NULL, 
	created_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), display_name VARCHAR(255), 
	CONSTRAINT endpoint_bindings_pk PRIMARY KEY (endpoint_id, resource_type, resource_id), 
	CONSTRAINT fk_endpoint_bindings_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE
);
CREATE TABLE endpoint_model_mappings (
	mapping_id VARCHAR(36) NOT NULL, 
	endpoint_id VARCHAR(36) NOT NULL, 
	model_definition_id VARCHAR(36) NOT NULL, 
	weight FLOAT NOT NULL, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, linkage_type VARCHAR(64) DEFAULT 'PRIMARY' NOT NULL, fallback_order INTEGER, 
	CONSTRAINT endpoint_model_mappings_pk PRIMARY KEY (mapping_id), 
	CONSTRAINT fk_endpoint_model_mappings_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE, 
	CONSTRAINT fk_endpoint_model_mappings_model_definition_id FOREIGN KEY(model_definition_id) REFERENCES model_definitions (model_definition_id)
);
CREATE TABLE endpoint_tags (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	endpoint_id VARCHAR(36) NOT NULL, 
	CONSTRAINT endpoint_tag_pk PRIMARY KEY ("key", endpoint_id), 
	CONSTRAINT fk_endpoint_tags_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE
);
CREATE TABLE "endpoints" (
	endpoint_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255), 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	routing_strategy VARCHAR(64), 
	fallback_config_json TEXT, 
	experiment_id INTEGER, 
	usage_tracking BOOLEAN DEFAULT '0' NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT endpoints_pk PRIMARY KEY (endpoint_id), 
	CONSTRAINT fk_endpoints_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE SET NULL, 
	CONSTRAINT uq_endpoints_workspace_name UNIQUE (workspace, name)
);
CREATE TABLE entity_associations (
	association_id VARCHAR(36) NOT NULL, 
	source_type VARCHAR(36) NOT NULL, 
	source_id VARCHAR(36) NOT NULL, 
	destination_type VARCHAR(36) NOT NULL, 
	destination_id VARCHAR(36) NOT NULL, 
	created_time BIGINT, 
	CONSTRAINT entity_associations_pk PRIMARY KEY (source_type, source_id, destination_type, destination_id)
);
CREATE TABLE "evaluation_dataset_records" (
	dataset_record_id VARCHAR(36) NOT NULL, 
	dataset_id VARCHAR(36) NOT NULL, 
	inputs JSON NOT NULL, 
	expectations JSON, 
	tags JSON, 
	source JSON, 
	source_id VARCHAR(36), 
	source_type VARCHAR(255), 
	created_time BIGINT, 
	last_update_time BIGINT, 
	created_by VARCHAR(255), 
	last_updated_by VARCHAR(255), 
	input_hash VARCHAR(64) NOT NULL, outputs JSON, 
	CONSTRAINT evaluation_dataset_records_pk PRIMARY KEY (dataset_record_id), 
	CONSTRAINT fk_evaluation_dataset_records_dataset_id FOREIGN KEY(dataset_id) REFERENCES evaluation_datasets (dataset_id) ON DELETE CASCADE, 
	CONSTRAINT unique_dataset_input UNIQUE (dataset_id, input_hash)
);
CREATE TABLE evaluation_dataset_tags (
	dataset_id VARCHAR(36) NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	value VARCHAR(5000), 
	CONSTRAINT evaluation_dataset_tags_pk PRIMARY KEY (dataset_id, "key"), 
	CONSTRAINT fk_evaluation_dataset_tags_dataset_id FOREIGN KEY(dataset_id) REFERENCES evaluation_datasets (dataset_id) ON DELETE CASCADE
);
CREATE TABLE "evaluation_datasets" (
	dataset_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	schema TEXT, 
	profile TEXT, 
	digest VARCHAR(64), 
	created_time BIGINT, 
	last_update_time BIGINT, 
	created_by VARCHAR(255), 
	last_updated_by VARCHAR(255), 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT evaluation_datasets_pk PRIMARY KEY (dataset_id)
);
CREATE TABLE "experiment_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value TEXT, 
	experiment_id INTEGER NOT NULL, 
	CONSTRAINT experiment_tag_pk PRIMARY KEY ("key", experiment_id), 
	FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id)
);
CREATE TABLE "experiments" (
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	artifact_location VARCHAR(256), 
	lifecycle_stage VARCHAR(32), 
	creation_time BIGINT, 
	last_update_time BIGINT, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT experiment_pk PRIMARY KEY (experiment_id), 
	CONSTRAINT experiments_lifecycle_stage CHECK (lifecycle_stage IN ('active', 'deleted')), 
	CONSTRAINT uq_experiments_workspace_name UNIQUE (workspace, name)
);
INSERT INTO "experiments" VALUES(0,'Default','{HOME}/mlruns/0','active',1796054230245,1796054230245,'default');
INSERT INTO "experiments" VALUES(1,'patchbay/tiny-planted','file://{HOME}/mlartifacts/patchbay-tiny-planted','active',1796054230385,1796054230385,'default');
INSERT INTO "experiments" VALUES(2,'patchbay/tiny-0','file://{HOME}/mlartifacts/patchbay-tiny-0','active',1796054286710,1796054286710,'default');
CREATE TABLE guardrail_configs (
	endpoint_id VARCHAR(36) NOT NULL, 
	guardrail_id VARCHAR(36) NOT NULL, 
	execution_order INTEGER, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT guardrail_configs_pk PRIMARY KEY (endpoint_id, guardrail_id), 
	CONSTRAINT fk_guardrail_configs_endpoint_id FOREIGN KEY(endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE CASCADE, 
	CONSTRAINT fk_guardrail_configs_guardrail_id FOREIGN KEY(guardrail_id) REFERENCES guardrails (guardrail_id) ON DELETE CASCADE
);
CREATE TABLE guardrails (
	guardrail_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	scorer_id VARCHAR(36) NOT NULL, 
	scorer_version INTEGER NOT NULL, 
	stage VARCHAR(32) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	action_endpoint_id VARCHAR(36), 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT guardrails_pk PRIMARY KEY (guardrail_id), 
	CONSTRAINT fk_guardrails_scorer_version FOREIGN KEY(scorer_id, scorer_version) REFERENCES scorer_versions (scorer_id, scorer_version), 
	CONSTRAINT fk_guardrails_action_endpoint_id FOREIGN KEY(action_endpoint_id) REFERENCES endpoints (endpoint_id) ON DELETE SET NULL
);
CREATE TABLE input_tags (
	input_uuid VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	value VARCHAR(500) NOT NULL, 
	CONSTRAINT input_tags_pk PRIMARY KEY (input_uuid, name)
);
CREATE TABLE inputs (
	input_uuid VARCHAR(36) NOT NULL, 
	source_type VARCHAR(36) NOT NULL, 
	source_id VARCHAR(36) NOT NULL, 
	destination_type VARCHAR(36) NOT NULL, 
	destination_id VARCHAR(36) NOT NULL, step BIGINT DEFAULT '0' NOT NULL, 
	CONSTRAINT inputs_pk PRIMARY KEY (source_type, source_id, destination_type, destination_id)
);
INSERT INTO "inputs" VALUES('6e6ba20d31f44806a4e2eac6e52b5019','RUN_OUTPUT','954e52fe0e9447f59b5879a9e2e4067b','MODEL_OUTPUT','m-60187e0aa0484c34bd62404841456f5c',0);
INSERT INTO "inputs" VALUES('56fb59ebde3d4ddbb1e49bbfa4fd1219','RUN_OUTPUT','d1faba4c8ab64d588c045cb111be4743','MODEL_OUTPUT','m-d652324f551a48d58ac349f22ecd5879',0);
INSERT INTO "inputs" VALUES('fb5404caeb884f3490e679bb4e92d511','RUN_OUTPUT','c603633e3c064a4d87c879b5bc953ddd','MODEL_OUTPUT','m-b8316e49c7274b51af6d2533315eee05',0);
INSERT INTO "inputs" VALUES('096963941d6845b3862ce248d5701bcd','RUN_OUTPUT','3fcd8717d8a942419e31b6525681d3d8','MODEL_OUTPUT','m-75d94d0a07974450a9d810caf541853a',0);
INSERT INTO "inputs" VALUES('a4ad7d338982456bbd91903c26599b45','RUN_OUTPUT','121b1775b8a74a2db9e3559e2d2bdb28','MODEL_OUTPUT','m-c588b4336ff244178ac5dd0b96db8513',0);
INSERT INTO "inputs" VALUES('fb1b638edf45434bbd08edb50e1b9525','DATASET','cc0836ea926947c28cada10dadbc930a','RUN','954e52fe0e9447f59b5879a9e2e4067b',0);
INSERT INTO "inputs" VALUES('8f113c5e457c4a86931c72446bf2f30a','DATASET','cc0836ea926947c28cada10dadbc930a','RUN','d1faba4c8ab64d588c045cb111be4743',0);
CREATE TABLE issues (
	issue_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	description TEXT NOT NULL, 
	status VARCHAR(50) NOT NULL, 
	severity VARCHAR(50), 
	root_causes TEXT, 
	source_run_id VARCHAR(32), 
	categories TEXT, 
	created_timestamp BIGINT NOT NULL, 
	last_updated_timestamp BIGINT NOT NULL, 
	created_by VARCHAR(255), 
	CONSTRAINT issues_pk PRIMARY KEY (issue_id), 
	CONSTRAINT fk_issues_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE, 
	CONSTRAINT fk_issues_source_run_id FOREIGN KEY(source_run_id) REFERENCES runs (run_uuid) ON DELETE SET NULL
);
CREATE TABLE job_locks (
	lock_key VARCHAR(255) NOT NULL, 
	job_id VARCHAR(36) NOT NULL, 
	acquired_at BIGINT NOT NULL, 
	CONSTRAINT job_locks_pk PRIMARY KEY (lock_key), 
	CONSTRAINT fk_job_locks_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE TABLE "jobs" (
	id VARCHAR(36) NOT NULL, 
	creation_time BIGINT NOT NULL, 
	job_name VARCHAR(500) NOT NULL, 
	params TEXT NOT NULL, 
	timeout FLOAT, 
	status INTEGER NOT NULL, 
	result TEXT, 
	retry_count INTEGER NOT NULL, 
	last_update_time BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, status_details JSON, creator VARCHAR(255), executor_backend VARCHAR(255), lease_expires_at BIGINT, status_message TEXT, progress JSON, progress_updated_at BIGINT, token_hash VARCHAR(64), scoped_permissions JSON, next_attempt_at BIGINT, 
	CONSTRAINT jobs_pk PRIMARY KEY (id)
);
CREATE TABLE label_schemas (
	schema_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	type VARCHAR(16) NOT NULL, 
	instruction TEXT, 
	enable_comment BOOLEAN DEFAULT '0' NOT NULL, 
	input_type VARCHAR(32) NOT NULL, 
	input_config TEXT NOT NULL, 
	created_by VARCHAR(255), 
	created_time BIGINT NOT NULL, 
	last_update_time BIGINT NOT NULL, 
	is_default BOOLEAN DEFAULT 0 NOT NULL, 
	CONSTRAINT label_schemas_pk PRIMARY KEY (schema_id), 
	CONSTRAINT fk_label_schemas_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE, 
	CONSTRAINT uq_label_schemas_exp_name UNIQUE (experiment_id, name)
);
CREATE TABLE "latest_metrics" (
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT NOT NULL, 
	timestamp BIGINT, 
	step BIGINT NOT NULL, 
	is_nan BOOLEAN NOT NULL, 
	run_uuid VARCHAR(32) NOT NULL, 
	CONSTRAINT latest_metric_pk PRIMARY KEY ("key", run_uuid), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid), 
	CHECK (is_nan IN (0, 1))
);
INSERT INTO "latest_metrics" VALUES('quality/accuracy',0.5,1796054471180,0,0,'954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "latest_metrics" VALUES('target/repeat',0.1,1796054471180,0,0,'954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "latest_metrics" VALUES('quality/accuracy',0.4,1796054471325,0,0,'d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "latest_metrics" VALUES('target/repeat',0.9,1796054471325,0,0,'d1faba4c8ab64d588c045cb111be4743');
CREATE TABLE logged_model_metrics (
	model_id VARCHAR(36) NOT NULL, 
	metric_name VARCHAR(500) NOT NULL, 
	metric_timestamp_ms BIGINT NOT NULL, 
	metric_step BIGINT NOT NULL, 
	metric_value FLOAT, 
	experiment_id INTEGER NOT NULL, 
	run_id VARCHAR(32) NOT NULL, 
	dataset_uuid VARCHAR(36), 
	dataset_name VARCHAR(500), 
	dataset_digest VARCHAR(36), 
	CONSTRAINT logged_model_metrics_pk PRIMARY KEY (model_id, metric_name, metric_timestamp_ms, metric_step, run_id), 
	CONSTRAINT fk_logged_model_metrics_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_logged_model_metrics_model_id FOREIGN KEY(model_id) REFERENCES logged_models (model_id) ON DELETE CASCADE, 
	CONSTRAINT fk_logged_model_metrics_run_id FOREIGN KEY(run_id) REFERENCES runs (run_uuid) ON DELETE CASCADE
);
INSERT INTO "logged_model_metrics" VALUES('m-60187e0aa0484c34bd62404841456f5c','quality/accuracy',1796054471180,0,0.5,1,'954e52fe0e9447f59b5879a9e2e4067b',NULL,'repeats','dddddddddddddddddddddddddddddddd');
INSERT INTO "logged_model_metrics" VALUES('m-60187e0aa0484c34bd62404841456f5c','target/repeat',1796054471180,0,0.1,1,'954e52fe0e9447f59b5879a9e2e4067b',NULL,'repeats','dddddddddddddddddddddddddddddddd');
INSERT INTO "logged_model_metrics" VALUES('m-d652324f551a48d58ac349f22ecd5879','quality/accuracy',1796054471325,0,0.4,1,'d1faba4c8ab64d588c045cb111be4743',NULL,'repeats','dddddddddddddddddddddddddddddddd');
INSERT INTO "logged_model_metrics" VALUES('m-d652324f551a48d58ac349f22ecd5879','target/repeat',1796054471325,0,0.9,1,'d1faba4c8ab64d588c045cb111be4743',NULL,'repeats','dddddddddddddddddddddddddddddddd');
CREATE TABLE logged_model_params (
	model_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	param_key VARCHAR(255) NOT NULL, 
	param_value TEXT NOT NULL, 
	CONSTRAINT logged_model_params_pk PRIMARY KEY (model_id, param_key), 
	CONSTRAINT fk_logged_model_params_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_logged_model_params_model_id FOREIGN KEY(model_id) REFERENCES logged_models (model_id) ON DELETE CASCADE
);
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.damp_layers','[0]');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.damp_limit','4.0');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.keep_first','True');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.mode','zero');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.neurons','[[1, 7]]');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.only_repeats','True');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.run_layers','[]');
INSERT INTO "logged_model_params" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'config.run_limit','16.0');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.damp_layers','[0]');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.damp_limit','4.0');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.keep_first','True');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.mode','zero');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.neurons','[[1, 7]]');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.only_repeats','True');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.run_layers','[]');
INSERT INTO "logged_model_params" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'config.run_limit','16.0');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.activation','jumprelu');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.features','[3, 7]');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.k','0');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.normalise','none');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.op','zero');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.site','visual.transformer.resblocks.1');
INSERT INTO "logged_model_params" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'config.tokens','all');
CREATE TABLE logged_model_tags (
	model_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	tag_key VARCHAR(255) NOT NULL, 
	tag_value TEXT NOT NULL, 
	CONSTRAINT logged_model_tags_pk PRIMARY KEY (model_id, tag_key), 
	CONSTRAINT fk_logged_model_tags_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_logged_model_tags_model_id FOREIGN KEY(model_id) REFERENCES logged_models (model_id) ON DELETE CASCADE
);
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'patch.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'patch.kind','base');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'patch.op','none');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'system','none');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'base.name','tiny:planted');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'parent.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'data.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'code.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'model.id','m-60187e0aa0484c34bd62404841456f5c');
INSERT INTO "logged_model_tags" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'gate.status','passed');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'patch.digest','fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'patch.kind','patch');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'patch.op','SinkEdit');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'system','attention_sink');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'base.name','tiny:planted');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'parent.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'data.digest','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'code.digest','4b43fa0e6f3f72a8b4cfb26498997813e3f91b265e9031ab954f3f31e9014fe9');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'model.id','m-d652324f551a48d58ac349f22ecd5879');
INSERT INTO "logged_model_tags" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'gate.status','passed');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'patch.digest','7d9221ebb9593717d08009a48b35fe49eded4371b61326de3b6a131a3ade5d33');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'patch.kind','patch');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'patch.op','SinkEdit');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'system','attention_sink');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'base.name','tiny:planted');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'parent.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'data.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'code.digest','4b43fa0e6f3f72a8b4cfb26498997813e3f91b265e9031ab954f3f31e9014fe9');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'model.id','m-b8316e49c7274b51af6d2533315eee05');
INSERT INTO "logged_model_tags" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'gate.status','pending');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'patch.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'patch.kind','base');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'patch.op','none');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'system','none');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'base.digest','b2bc9ff8588ae5bb8ca1fa00091ffef84145feec321637aefe1c363e3bf32161');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'base.name','tiny:0');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'parent.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'data.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'code.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'model.id','m-75d94d0a07974450a9d810caf541853a');
INSERT INTO "logged_model_tags" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'gate.status','passed');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'patch.digest','65e6d87ec671c5d7c791c8c32bdfde9d383da80fd8bbd1b53d85dd88beaa1bf7');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'patch.kind','patch');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'patch.op','FeatureEdit');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'system','clip_sae');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'base.digest','b2bc9ff8588ae5bb8ca1fa00091ffef84145feec321637aefe1c363e3bf32161');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'base.name','tiny:0');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'parent.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'data.digest','none');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'code.digest','3da320a0364a0b947adbb6aa51c952d9fad72e05b5632552f61cda1103ebac85');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'model.id','m-c588b4336ff244178ac5dd0b96db8513');
INSERT INTO "logged_model_tags" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'gate.status','pending');
CREATE TABLE logged_models (
	model_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(500) NOT NULL, 
	artifact_location VARCHAR(1000) NOT NULL, 
	creation_timestamp_ms BIGINT NOT NULL, 
	last_updated_timestamp_ms BIGINT NOT NULL, 
	status INTEGER NOT NULL, 
	lifecycle_stage VARCHAR(32), 
	model_type VARCHAR(500), 
	source_run_id VARCHAR(32), 
	status_message VARCHAR(1000), 
	CONSTRAINT logged_models_pk PRIMARY KEY (model_id), 
	CONSTRAINT logged_models_lifecycle_stage_check CHECK (lifecycle_stage IN ('active', 'deleted')), 
	CONSTRAINT fk_logged_models_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
INSERT INTO "logged_models" VALUES('m-60187e0aa0484c34bd62404841456f5c',1,'base-ccd6255509711c03','file://{HOME}/mlartifacts/patchbay-tiny-planted/models/m-60187e0aa0484c34bd62404841456f5c/artifacts',1796054230631,1796054230765,2,'active','base','954e52fe0e9447f59b5879a9e2e4067b',NULL);
INSERT INTO "logged_models" VALUES('m-d652324f551a48d58ac349f22ecd5879',1,'attention_sink-fccd4f07f79046fd','file://{HOME}/mlartifacts/patchbay-tiny-planted/models/m-d652324f551a48d58ac349f22ecd5879/artifacts',1796054230888,1796054235465,2,'active','patch','d1faba4c8ab64d588c045cb111be4743',NULL);
INSERT INTO "logged_models" VALUES('m-b8316e49c7274b51af6d2533315eee05',1,'attention_sink-7d9221ebb9593717','file://{HOME}/mlartifacts/patchbay-tiny-planted/models/m-b8316e49c7274b51af6d2533315eee05/artifacts',1796054259808,1796054264577,2,'active','patch','c603633e3c064a4d87c879b5bc953ddd',NULL);
INSERT INTO "logged_models" VALUES('m-75d94d0a07974450a9d810caf541853a',2,'base-b2bc9ff8588ae5bb','file://{HOME}/mlartifacts/patchbay-tiny-0/models/m-75d94d0a07974450a9d810caf541853a/artifacts',1796054287247,1796054287397,2,'active','base','3fcd8717d8a942419e31b6525681d3d8',NULL);
INSERT INTO "logged_models" VALUES('m-c588b4336ff244178ac5dd0b96db8513',2,'clip_sae-65e6d87ec671c5d7','file://{HOME}/mlartifacts/patchbay-tiny-0/models/m-c588b4336ff244178ac5dd0b96db8513/artifacts',1796054287664,1796054294305,2,'active','patch','121b1775b8a74a2db9e3559e2d2bdb28',NULL);
CREATE TABLE mcp_access_endpoints (
	id VARCHAR(36) NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	server_name VARCHAR(256) NOT NULL, 
	server_version VARCHAR(128), 
	server_alias VARCHAR(256), 
	url VARCHAR(2048) NOT NULL, 
	transport_type VARCHAR(32) DEFAULT 'streamable-http' NOT NULL, 
	created_by VARCHAR(256), 
	last_updated_by VARCHAR(256), 
	created_at BIGINT NOT NULL, 
	last_updated_at BIGINT NOT NULL, 
	CONSTRAINT mcp_access_endpoints_pk PRIMARY KEY (id), 
	CONSTRAINT mcp_access_endpoints_server_fkey FOREIGN KEY(workspace, server_name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_aliases (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	alias VARCHAR(256) NOT NULL, 
	version VARCHAR(128) NOT NULL, 
	CONSTRAINT mcp_server_aliases_pk PRIMARY KEY (workspace, name, alias), 
	CONSTRAINT mcp_server_aliases_server_fkey FOREIGN KEY(workspace, name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_tags (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	CONSTRAINT mcp_server_tags_pk PRIMARY KEY (workspace, name, "key"), 
	CONSTRAINT mcp_server_tags_server_fkey FOREIGN KEY(workspace, name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_version_tags (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	version VARCHAR(128) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	CONSTRAINT mcp_server_version_tags_pk PRIMARY KEY (workspace, name, version, "key"), 
	CONSTRAINT mcp_server_version_tags_version_fkey FOREIGN KEY(workspace, name, version) REFERENCES mcp_server_versions (workspace, name, version) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_server_versions (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	version VARCHAR(128) NOT NULL, 
	version_major INTEGER NOT NULL, 
	version_minor INTEGER NOT NULL, 
	version_patch INTEGER NOT NULL, 
	version_prerelease_sort_key VARCHAR(512) NOT NULL, 
	server_json JSON NOT NULL, 
	status VARCHAR(20) DEFAULT 'draft' NOT NULL, 
	tools JSON, 
	source VARCHAR(512), 
	connect_options JSON, 
	created_by VARCHAR(256), 
	last_updated_by VARCHAR(256), 
	created_at BIGINT NOT NULL, 
	last_updated_at BIGINT NOT NULL, 
	CONSTRAINT mcp_server_versions_pk PRIMARY KEY (workspace, name, version), 
	CONSTRAINT mcp_server_versions_server_fkey FOREIGN KEY(workspace, name) REFERENCES mcp_servers (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
CREATE TABLE mcp_servers (
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	display_name VARCHAR(256), 
	description TEXT, 
	icons JSON, 
	created_by VARCHAR(256), 
	last_updated_by VARCHAR(256), 
	created_at BIGINT NOT NULL, 
	last_updated_at BIGINT NOT NULL, 
	CONSTRAINT mcp_servers_pk PRIMARY KEY (workspace, name)
);
CREATE TABLE "metrics" (
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT NOT NULL, 
	timestamp BIGINT NOT NULL, 
	run_uuid VARCHAR(32) NOT NULL, 
	step BIGINT DEFAULT '0' NOT NULL, 
	is_nan BOOLEAN DEFAULT '0' NOT NULL, 
	CONSTRAINT metric_pk PRIMARY KEY ("key", timestamp, step, run_uuid, value, is_nan), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid), 
	CHECK (is_nan IN (0, 1))
);
INSERT INTO "metrics" VALUES('quality/accuracy',0.5,1796054471180,'954e52fe0e9447f59b5879a9e2e4067b',0,0);
INSERT INTO "metrics" VALUES('target/repeat',0.1,1796054471180,'954e52fe0e9447f59b5879a9e2e4067b',0,0);
INSERT INTO "metrics" VALUES('quality/accuracy',0.4,1796054471325,'d1faba4c8ab64d588c045cb111be4743',0,0);
INSERT INTO "metrics" VALUES('target/repeat',0.9,1796054471325,'d1faba4c8ab64d588c045cb111be4743',0,0);
CREATE TABLE "model_definitions" (
	model_definition_id VARCHAR(36) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	secret_id VARCHAR(36), 
	provider VARCHAR(64) NOT NULL, 
	model_name VARCHAR(256) NOT NULL, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT model_definitions_pk PRIMARY KEY (model_definition_id), 
	CONSTRAINT fk_model_definitions_secret_id FOREIGN KEY(secret_id) REFERENCES secrets (secret_id) ON DELETE SET NULL, 
	CONSTRAINT uq_model_definitions_workspace_name UNIQUE (workspace, name)
);
CREATE TABLE "model_version_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value TEXT, 
	name VARCHAR(256) NOT NULL, 
	version INTEGER NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT model_version_tag_pk PRIMARY KEY (workspace, "key", name, version), 
	CONSTRAINT fk_model_version_tags_model_versions FOREIGN KEY(workspace, name, version) REFERENCES model_versions (workspace, name, version) ON UPDATE CASCADE
);
INSERT INTO "model_version_tags" VALUES('patch.digest','none','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('patch.kind','base','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('patch.op','none','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('system','none','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('base.name','tiny:planted','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('parent.digest','none','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('data.digest','none','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('code.digest','none','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('model.id','m-60187e0aa0484c34bd62404841456f5c','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('gate.status','passed','tiny-planted',1,'default');
INSERT INTO "model_version_tags" VALUES('patch.digest','fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('patch.kind','patch','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('patch.op','SinkEdit','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('system','attention_sink','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('base.name','tiny:planted','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('parent.digest','none','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('data.digest','dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('code.digest','4b43fa0e6f3f72a8b4cfb26498997813e3f91b265e9031ab954f3f31e9014fe9','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('model.id','m-d652324f551a48d58ac349f22ecd5879','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('gate.status','passed','tiny-planted',2,'default');
INSERT INTO "model_version_tags" VALUES('patch.digest','7d9221ebb9593717d08009a48b35fe49eded4371b61326de3b6a131a3ade5d33','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('patch.kind','patch','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('patch.op','SinkEdit','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('system','attention_sink','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('base.name','tiny:planted','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('parent.digest','none','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('data.digest','none','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('code.digest','4b43fa0e6f3f72a8b4cfb26498997813e3f91b265e9031ab954f3f31e9014fe9','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('model.id','m-b8316e49c7274b51af6d2533315eee05','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('gate.status','pending','tiny-planted',3,'default');
INSERT INTO "model_version_tags" VALUES('patch.digest','none','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('patch.kind','base','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('patch.op','none','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('system','none','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('base.digest','b2bc9ff8588ae5bb8ca1fa00091ffef84145feec321637aefe1c363e3bf32161','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('base.name','tiny:0','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('parent.digest','none','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('data.digest','none','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('code.digest','none','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('model.id','m-75d94d0a07974450a9d810caf541853a','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('gate.status','passed','tiny-0',1,'default');
INSERT INTO "model_version_tags" VALUES('patch.digest','65e6d87ec671c5d7c791c8c32bdfde9d383da80fd8bbd1b53d85dd88beaa1bf7','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('patch.kind','patch','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('patch.op','FeatureEdit','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('system','clip_sae','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('base.digest','b2bc9ff8588ae5bb8ca1fa00091ffef84145feec321637aefe1c363e3bf32161','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('base.name','tiny:0','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('parent.digest','none','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('data.digest','none','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('code.digest','3da320a0364a0b947adbb6aa51c952d9fad72e05b5632552f61cda1103ebac85','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('model.id','m-c588b4336ff244178ac5dd0b96db8513','tiny-0',2,'default');
INSERT INTO "model_version_tags" VALUES('gate.status','pending','tiny-0',2,'default');
CREATE TABLE "model_versions" (
	name VARCHAR(256) NOT NULL, 
	version INTEGER NOT NULL, 
	creation_time BIGINT, 
	last_updated_time BIGINT, 
	description VARCHAR(5000), 
	user_id VARCHAR(256), 
	current_stage VARCHAR(20), 
	source VARCHAR(500), 
	run_id VARCHAR(32), 
	status VARCHAR(20), 
	status_message VARCHAR(500), 
	run_link VARCHAR(500), 
	storage_location VARCHAR(500), 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT model_version_pk PRIMARY KEY (workspace, name, version), 
	CONSTRAINT fk_model_versions_registered_models FOREIGN KEY(workspace, name) REFERENCES registered_models (workspace, name) ON UPDATE CASCADE
);
INSERT INTO "model_versions" VALUES('tiny-planted',1,1796054230869,1796054230869,'tiny:planted, unpatched; its weights are not kept here',NULL,'None','models:/m-60187e0aa0484c34bd62404841456f5c','954e52fe0e9447f59b5879a9e2e4067b','READY',NULL,NULL,'file://{HOME}/mlartifacts/patchbay-tiny-planted/models/m-60187e0aa0484c34bd62404841456f5c/artifacts','default');
INSERT INTO "model_versions" VALUES('tiny-planted',2,1796054235648,1796054235648,'Find why a language model fails to repeat a word, and patch it',NULL,'None','models:/m-d652324f551a48d58ac349f22ecd5879','d1faba4c8ab64d588c045cb111be4743','READY',NULL,NULL,'file://{HOME}/mlartifacts/patchbay-tiny-planted/models/m-d652324f551a48d58ac349f22ecd5879/artifacts','default');
INSERT INTO "model_versions" VALUES('tiny-planted',3,1796054264722,1796054264722,'Find why a language model fails to repeat a word, and patch it',NULL,'None','models:/m-b8316e49c7274b51af6d2533315eee05','c603633e3c064a4d87c879b5bc953ddd','READY',NULL,NULL,'file://{HOME}/mlartifacts/patchbay-tiny-planted/models/m-b8316e49c7274b51af6d2533315eee05/artifacts','default');
INSERT INTO "model_versions" VALUES('tiny-0',1,1796054287502,1796054287502,'tiny:0, unpatched; its weights are not kept here',NULL,'None','models:/m-75d94d0a07974450a9d810caf541853a','3fcd8717d8a942419e31b6525681d3d8','READY',NULL,NULL,'file://{HOME}/mlartifacts/patchbay-tiny-0/models/m-75d94d0a07974450a9d810caf541853a/artifacts','default');
INSERT INTO "model_versions" VALUES('tiny-0',2,1796054294518,1796054294518,'Steer and suppress sparse-autoencoder features of CLIP''s vision transformer',NULL,'None','models:/m-c588b4336ff244178ac5dd0b96db8513','121b1775b8a74a2db9e3559e2d2bdb28','READY',NULL,NULL,'file://{HOME}/mlartifacts/patchbay-tiny-0/models/m-c588b4336ff244178ac5dd0b96db8513/artifacts','default');
CREATE TABLE online_scoring_configs (
	online_scoring_config_id VARCHAR(36) NOT NULL, 
	scorer_id VARCHAR(36) NOT NULL, 
	sample_rate FLOAT NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	filter_string TEXT, 
	CONSTRAINT online_scoring_config_pk PRIMARY KEY (online_scoring_config_id), 
	CONSTRAINT fk_online_scoring_configs_scorer_id FOREIGN KEY(scorer_id) REFERENCES scorers (scorer_id) ON DELETE CASCADE, 
	CONSTRAINT fk_online_scoring_configs_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id)
);
CREATE TABLE "params" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000) NOT NULL, 
	run_uuid VARCHAR(32) NOT NULL, 
	CONSTRAINT param_pk PRIMARY KEY ("key", run_uuid), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid)
);
INSERT INTO "params" VALUES('config.damp_layers','[0]','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.damp_limit','4.0','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.keep_first','True','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.mode','zero','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.neurons','[[1, 7]]','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.only_repeats','True','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.run_layers','[]','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.run_limit','16.0','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "params" VALUES('config.damp_layers','[0]','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.damp_limit','4.0','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.keep_first','True','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.mode','zero','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.neurons','[[1, 7]]','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.only_repeats','True','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.run_layers','[]','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.run_limit','16.0','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "params" VALUES('config.activation','jumprelu','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "params" VALUES('config.features','[3, 7]','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "params" VALUES('config.k','0','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "params" VALUES('config.normalise','none','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "params" VALUES('config.op','zero','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "params" VALUES('config.site','visual.transformer.resblocks.1','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "params" VALUES('config.tokens','all','121b1775b8a74a2db9e3559e2d2bdb28');
CREATE TABLE "registered_model_aliases" (
	alias VARCHAR(256) NOT NULL, 
	version INTEGER NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT registered_model_alias_pk PRIMARY KEY (workspace, name, alias), 
	CONSTRAINT fk_registered_model_aliases_registered_models FOREIGN KEY(workspace, name) REFERENCES registered_models (workspace, name) ON DELETE CASCADE ON UPDATE CASCADE
);
INSERT INTO "registered_model_aliases" VALUES('attention_sink-champion',3,'tiny-planted','default');
INSERT INTO "registered_model_aliases" VALUES('clip_sae-champion',2,'tiny-0','default');
CREATE TABLE "registered_model_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(5000), 
	name VARCHAR(256) NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT registered_model_tag_pk PRIMARY KEY (workspace, "key", name), 
	CONSTRAINT fk_registered_model_tags_registered_models FOREIGN KEY(workspace, name) REFERENCES registered_models (workspace, name) ON UPDATE CASCADE
);
CREATE TABLE "registered_models" (
	name VARCHAR(256) NOT NULL, 
	creation_time BIGINT, 
	last_updated_time BIGINT, 
	description VARCHAR(5000), 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT registered_model_pk PRIMARY KEY (workspace, name)
);
INSERT INTO "registered_models" VALUES('tiny-planted',1796054230833,1796054264722,'tiny-planted and the patches made on it (patchbay)','default');
INSERT INTO "registered_models" VALUES('tiny-0',1796054287460,1796054294518,'tiny-0 and the patches made on it (patchbay)','default');
CREATE TABLE review_queue_items (
	queue_id VARCHAR(36) NOT NULL, 
	item_type VARCHAR(16) NOT NULL, 
	item_id VARCHAR(50) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	completed_by VARCHAR(250), 
	completed_time_ms BIGINT, 
	creation_time_ms BIGINT NOT NULL, 
	last_update_time_ms BIGINT NOT NULL, 
	CONSTRAINT review_queue_items_pk PRIMARY KEY (queue_id, item_id), 
	CONSTRAINT fk_review_queue_items_queue_id FOREIGN KEY(queue_id) REFERENCES review_queues (queue_id) ON DELETE CASCADE
);
CREATE TABLE review_queue_label_schemas (
	queue_id VARCHAR(36) NOT NULL, 
	schema_id VARCHAR(36) NOT NULL, 
	CONSTRAINT review_queue_label_schemas_pk PRIMARY KEY (queue_id, schema_id), 
	CONSTRAINT fk_review_queue_label_schemas_queue_id FOREIGN KEY(queue_id) REFERENCES review_queues (queue_id) ON DELETE CASCADE
);
CREATE TABLE review_queue_users (
	queue_id VARCHAR(36) NOT NULL, 
	user_id VARCHAR(250) NOT NULL, 
	CONSTRAINT review_queue_users_pk PRIMARY KEY (queue_id, user_id), 
	CONSTRAINT fk_review_queue_users_queue_id FOREIGN KEY(queue_id) REFERENCES review_queues (queue_id) ON DELETE CASCADE
);
CREATE TABLE review_queues (
	queue_id VARCHAR(36) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	name VARCHAR(250) NOT NULL, 
	queue_type VARCHAR(16) NOT NULL, 
	created_by VARCHAR(255), 
	creation_time_ms BIGINT NOT NULL, 
	last_update_time_ms BIGINT NOT NULL, 
	name_key VARCHAR(250) NOT NULL, 
	CONSTRAINT review_queues_pk PRIMARY KEY (queue_id), 
	CONSTRAINT fk_review_queues_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE, 
	CONSTRAINT uq_review_queues_experiment_name_key UNIQUE (experiment_id, name_key)
);
CREATE TABLE "runs" (
	run_uuid VARCHAR(32) NOT NULL, 
	name VARCHAR(250), 
	source_type VARCHAR(20), 
	source_name VARCHAR(500), 
	entry_point_name VARCHAR(50), 
	user_id VARCHAR(256), 
	status VARCHAR(9), 
	start_time BIGINT, 
	end_time BIGINT, 
	source_version VARCHAR(50), 
	lifecycle_stage VARCHAR(20), 
	artifact_uri VARCHAR(200), 
	experiment_id INTEGER, deleted_time BIGINT, 
	CONSTRAINT run_pk PRIMARY KEY (run_uuid), 
	CONSTRAINT runs_lifecycle_stage CHECK (lifecycle_stage IN ('active', 'deleted')), 
	CONSTRAINT source_type CHECK (source_type IN ('NOTEBOOK', 'JOB', 'LOCAL', 'UNKNOWN', 'PROJECT')), 
	FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CHECK (status IN ('SCHEDULED', 'FAILED', 'FINISHED', 'RUNNING', 'KILLED'))
);
INSERT INTO "runs" VALUES('d1faba4c8ab64d588c045cb111be4743','attention_sink-fccd4f07','UNKNOWN','','','unknown','FINISHED',1796054230482,1796054230524,'','active','file://{HOME}/mlartifacts/patchbay-tiny-planted/d1faba4c8ab64d588c045cb111be4743/artifacts',1,NULL);
INSERT INTO "runs" VALUES('954e52fe0e9447f59b5879a9e2e4067b','base of attention_sink-fccd4f07','UNKNOWN','','','unknown','FINISHED',1796054230571,1796054230600,'','active','file://{HOME}/mlartifacts/patchbay-tiny-planted/954e52fe0e9447f59b5879a9e2e4067b/artifacts',1,NULL);
INSERT INTO "runs" VALUES('c603633e3c064a4d87c879b5bc953ddd','attention_sink-7d9221eb','UNKNOWN','','','unknown','FINISHED',1796054259491,1796054259608,'','active','file://{HOME}/mlartifacts/patchbay-tiny-planted/c603633e3c064a4d87c879b5bc953ddd/artifacts',1,NULL);
INSERT INTO "runs" VALUES('121b1775b8a74a2db9e3559e2d2bdb28','clip_sae-65e6d87e','UNKNOWN','','','unknown','FINISHED',1796054286878,1796054286968,'','active','file://{HOME}/mlartifacts/patchbay-tiny-0/121b1775b8a74a2db9e3559e2d2bdb28/artifacts',2,NULL);
INSERT INTO "runs" VALUES('3fcd8717d8a942419e31b6525681d3d8','base of clip_sae-65e6d87e','UNKNOWN','','','unknown','FINISHED',1796054287107,1796054287200,'','active','file://{HOME}/mlartifacts/patchbay-tiny-0/3fcd8717d8a942419e31b6525681d3d8/artifacts',2,NULL);
CREATE TABLE scheduler_leases (
	lease_key VARCHAR(255) NOT NULL, 
	acquired_at BIGINT NOT NULL, 
	ttl_seconds INTEGER NOT NULL, 
	CONSTRAINT scheduler_leases_pk PRIMARY KEY (lease_key)
);
CREATE TABLE scorer_versions (
	scorer_id VARCHAR(36) NOT NULL, 
	scorer_version INTEGER NOT NULL, 
	serialized_scorer TEXT NOT NULL, 
	creation_time BIGINT, 
	CONSTRAINT scorer_version_pk PRIMARY KEY (scorer_id, scorer_version), 
	CONSTRAINT fk_scorer_versions_scorer_id FOREIGN KEY(scorer_id) REFERENCES scorers (scorer_id) ON DELETE CASCADE
);
CREATE TABLE scorers (
	experiment_id INTEGER NOT NULL, 
	scorer_name VARCHAR(256) NOT NULL, 
	scorer_id VARCHAR(36) NOT NULL, 
	CONSTRAINT scorer_pk PRIMARY KEY (scorer_id), 
	CONSTRAINT fk_scorers_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
CREATE TABLE "secrets" (
	secret_id VARCHAR(36) NOT NULL, 
	secret_name VARCHAR(255) NOT NULL, 
	encrypted_value BLOB NOT NULL, 
	wrapped_dek BLOB NOT NULL, 
	kek_version INTEGER NOT NULL, 
	masked_value VARCHAR(500) NOT NULL, 
	provider VARCHAR(64), 
	auth_config TEXT, 
	description TEXT, 
	created_by VARCHAR(255), 
	created_at BIGINT NOT NULL, 
	last_updated_by VARCHAR(255), 
	last_updated_at BIGINT NOT NULL, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT secrets_pk PRIMARY KEY (secret_id), 
	CONSTRAINT uq_secrets_workspace_secret_name UNIQUE (workspace, secret_name)
);
CREATE TABLE span_metrics (
	trace_id VARCHAR(50) NOT NULL, 
	span_id VARCHAR(50) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT, 
	CONSTRAINT span_metrics_pk PRIMARY KEY (trace_id, span_id, "key"), 
	CONSTRAINT fk_span_metrics_span FOREIGN KEY(trace_id, span_id) REFERENCES spans (trace_id, span_id) ON DELETE CASCADE
);
CREATE TABLE "spans" (
	trace_id VARCHAR(50) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	span_id VARCHAR(50) NOT NULL, 
	parent_span_id VARCHAR(50), 
	name TEXT, 
	type VARCHAR(500), 
	status VARCHAR(50) NOT NULL, 
	start_time_unix_nano BIGINT NOT NULL, 
	end_time_unix_nano BIGINT, 
	duration_ns BIGINT GENERATED ALWAYS AS (end_time_unix_nano - start_time_unix_nano) STORED, 
	content TEXT NOT NULL, 
	input_cost FLOAT, 
	output_cost FLOAT, 
	total_cost FLOAT, 
	model_name VARCHAR(500), 
	model_provider VARCHAR(500), 
	CONSTRAINT spans_pk PRIMARY KEY (trace_id, span_id), 
	CONSTRAINT fk_spans_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id), 
	CONSTRAINT fk_spans_trace_id FOREIGN KEY(trace_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE sql_assessment_daily_rollups (
	id INTEGER NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	metric_name VARCHAR(250) NOT NULL, 
	grouping_set VARCHAR(50) NOT NULL, 
	sample_count BIGINT NOT NULL, 
	sum_value FLOAT, 
	min_value FLOAT, 
	max_value FLOAT, 
	CONSTRAINT sql_assessment_daily_rollups_pk PRIMARY KEY (id)
);
CREATE TABLE sql_span_cost_daily_rollups (
	id INTEGER NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	metric_name VARCHAR(250) NOT NULL, 
	grouping_set VARCHAR(50) NOT NULL, 
	model_name VARCHAR(500), 
	model_provider VARCHAR(500), 
	sample_count BIGINT NOT NULL, 
	sum_value FLOAT, 
	min_value FLOAT, 
	max_value FLOAT, 
	CONSTRAINT sql_span_cost_daily_rollups_pk PRIMARY KEY (id)
);
CREATE TABLE sql_trace_metric_daily_rollups (
	id INTEGER NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	metric_name VARCHAR(250) NOT NULL, 
	grouping_set VARCHAR(50) NOT NULL, 
	trace_status VARCHAR(50), 
	sample_count BIGINT NOT NULL, 
	sum_value FLOAT, 
	min_value FLOAT, 
	max_value FLOAT, 
	p50_value FLOAT, 
	p90_value FLOAT, 
	p99_value FLOAT, 
	CONSTRAINT sql_trace_metric_daily_rollups_pk PRIMARY KEY (id)
);
CREATE TABLE sql_trace_rollup_rebuild_queue (
	experiment_id INTEGER NOT NULL, 
	rollup_day DATE NOT NULL, 
	rollup_family VARCHAR(50) NOT NULL, 
	CONSTRAINT sql_trace_rollup_rebuild_queue_pk PRIMARY KEY (experiment_id, rollup_day, rollup_family)
);
CREATE TABLE "tags" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000), 
	run_uuid VARCHAR(32) NOT NULL, 
	CONSTRAINT tag_pk PRIMARY KEY ("key", run_uuid), 
	FOREIGN KEY(run_uuid) REFERENCES runs (run_uuid)
);
INSERT INTO "tags" VALUES('patch.digest','fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "tags" VALUES('system','attention_sink','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "tags" VALUES('base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "tags" VALUES('patch.side','patched','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "tags" VALUES('mlflow.runName','attention_sink-fccd4f07','d1faba4c8ab64d588c045cb111be4743');
INSERT INTO "tags" VALUES('patch.digest','fccd4f07f79046fd2171cf09074e6f209b0b0d2355130aa630e3b5602f432296','954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "tags" VALUES('system','attention_sink','954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "tags" VALUES('base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da','954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "tags" VALUES('patch.side','base','954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "tags" VALUES('mlflow.runName','base of attention_sink-fccd4f07','954e52fe0e9447f59b5879a9e2e4067b');
INSERT INTO "tags" VALUES('patch.digest','7d9221ebb9593717d08009a48b35fe49eded4371b61326de3b6a131a3ade5d33','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "tags" VALUES('system','attention_sink','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "tags" VALUES('base.digest','ccd6255509711c03a5606497de577f93a3be023b35e4b88df1d3ba75d7d721da','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "tags" VALUES('patch.side','patched','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "tags" VALUES('mlflow.runName','attention_sink-7d9221eb','c603633e3c064a4d87c879b5bc953ddd');
INSERT INTO "tags" VALUES('patch.digest','65e6d87ec671c5d7c791c8c32bdfde9d383da80fd8bbd1b53d85dd88beaa1bf7','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "tags" VALUES('system','clip_sae','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "tags" VALUES('base.digest','b2bc9ff8588ae5bb8ca1fa00091ffef84145feec321637aefe1c363e3bf32161','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "tags" VALUES('patch.side','patched','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "tags" VALUES('mlflow.runName','clip_sae-65e6d87e','121b1775b8a74a2db9e3559e2d2bdb28');
INSERT INTO "tags" VALUES('patch.digest','65e6d87ec671c5d7c791c8c32bdfde9d383da80fd8bbd1b53d85dd88beaa1bf7','3fcd8717d8a942419e31b6525681d3d8');
INSERT INTO "tags" VALUES('system','clip_sae','3fcd8717d8a942419e31b6525681d3d8');
INSERT INTO "tags" VALUES('base.digest','b2bc9ff8588ae5bb8ca1fa00091ffef84145feec321637aefe1c363e3bf32161','3fcd8717d8a942419e31b6525681d3d8');
INSERT INTO "tags" VALUES('patch.side','base','3fcd8717d8a942419e31b6525681d3d8');
INSERT INTO "tags" VALUES('mlflow.runName','base of clip_sae-65e6d87e','3fcd8717d8a942419e31b6525681d3d8');
CREATE TABLE "trace_info" (
	request_id VARCHAR(50) NOT NULL, 
	experiment_id INTEGER NOT NULL, 
	timestamp_ms BIGINT NOT NULL, 
	execution_time_ms BIGINT, 
	status VARCHAR(50) NOT NULL, 
	client_request_id VARCHAR(50), 
	request_preview VARCHAR(1000), 
	response_preview VARCHAR(1000), 
	db_payload_generation INTEGER DEFAULT '0' NOT NULL, trace_name VARCHAR(4096), session_id VARCHAR(250), input_tokens BIGINT, output_tokens BIGINT, total_tokens BIGINT, cache_read_input_tokens BIGINT, cache_creation_input_tokens BIGINT, cache_creation_input_tokens_above_1hr BIGINT, input_cost FLOAT, output_cost FLOAT, total_cost FLOAT, 
	CONSTRAINT trace_info_pk PRIMARY KEY (request_id), 
	CONSTRAINT fk_trace_info_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (experiment_id) ON DELETE CASCADE
);
CREATE TABLE trace_metrics (
	request_id VARCHAR(50) NOT NULL, 
	"key" VARCHAR(250) NOT NULL, 
	value FLOAT, 
	CONSTRAINT trace_metrics_pk PRIMARY KEY (request_id, "key"), 
	CONSTRAINT fk_trace_metrics_request_id FOREIGN KEY(request_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE "trace_request_metadata" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000), 
	request_id VARCHAR(50) NOT NULL, 
	CONSTRAINT trace_request_metadata_pk PRIMARY KEY ("key", request_id), 
	CONSTRAINT fk_trace_request_metadata_request_id FOREIGN KEY(request_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE "trace_tags" (
	"key" VARCHAR(250) NOT NULL, 
	value VARCHAR(8000), 
	request_id VARCHAR(50) NOT NULL, 
	CONSTRAINT trace_tag_pk PRIMARY KEY ("key", request_id), 
	CONSTRAINT fk_trace_tags_request_id FOREIGN KEY(request_id) REFERENCES trace_info (request_id) ON DELETE CASCADE
);
CREATE TABLE webhook_events (
	webhook_id VARCHAR(256) NOT NULL, 
	entity VARCHAR(50) NOT NULL, 
	action VARCHAR(50) NOT NULL, 
	CONSTRAINT webhook_event_pk PRIMARY KEY (webhook_id, entity, action), 
	FOREIGN KEY(webhook_id) REFERENCES webhooks (webhook_id) ON DELETE cascade
);
CREATE TABLE "webhooks" (
	webhook_id VARCHAR(256) NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	description VARCHAR(1000), 
	url VARCHAR(500) NOT NULL, 
	status VARCHAR(20) DEFAULT 'ACTIVE' NOT NULL, 
	secret VARCHAR(1000), 
	creation_timestamp BIGINT, 
	last_updated_timestamp BIGINT, 
	deleted_timestamp BIGINT, 
	workspace VARCHAR(63) DEFAULT 'default' NOT NULL, 
	CONSTRAINT webhook_pk PRIMARY KEY (webhook_id)
);
CREATE TABLE workspaces (
	name VARCHAR(63) NOT NULL, 
	description TEXT, 
	default_artifact_root TEXT, trace_archival_location TEXT, trace_archival_retention VARCHAR(32), 
	CONSTRAINT workspaces_pk PRIMARY KEY (name)
);
INSERT INTO "workspaces" VALUES('default','Default workspace for legacy resources',NULL,NULL,NULL);
CREATE INDEX index_metrics_run_uuid ON metrics (run_uuid);
CREATE INDEX index_latest_metrics_run_uuid ON latest_metrics (run_uuid);
CREATE INDEX index_inputs_input_uuid ON inputs (input_uuid);
CREATE INDEX index_inputs_destination_type_destination_id_source_type ON inputs (destination_type, destination_id, source_type);
CREATE INDEX index_params_run_uuid ON params (run_uuid);
CREATE INDEX index_trace_tags_request_id ON trace_tags (request_id);
CREATE INDEX index_trace_request_metadata_request_id ON trace_request_metadata (request_id);
CREATE INDEX index_tags_run_uuid ON tags (run_uuid);
CREATE INDEX index_datasets_experiment_id_dataset_source_type ON datasets (experiment_id, dataset_source_type);
CREATE INDEX index_datasets_dataset_uuid ON datasets (dataset_uuid);
CREATE INDEX index_logged_model_metrics_model_id ON logged_model_metrics (model_id);
CREATE INDEX index_entity_associations_association_id ON entity_associations (association_id);
CREATE INDEX index_entity_associations_reverse_lookup ON entity_associations (destination_type, destination_id, source_type, source_id);
CREATE INDEX idx_webhook_events_entity ON webhook_events (entity);
CREATE INDEX idx_webhook_events_action ON webhook_events (action);
CREATE INDEX idx_webhook_events_entity_action ON webhook_events (entity, action);
CREATE UNIQUE INDEX index_scorers_experiment_id_scorer_name ON scorers (experiment_id, scorer_name);
CREATE INDEX index_scorer_versions_scorer_id ON scorer_versions (scorer_id);
CREATE INDEX index_evaluation_dataset_tags_dataset_id ON evaluation_dataset_tags (dataset_id);
CREATE INDEX index_evaluation_dataset_records_dataset_id ON evaluation_dataset_records (dataset_id);
CREATE INDEX index_endpoint_model_mappings_endpoint_id ON endpoint_model_mappings (endpoint_id);
CREATE INDEX index_endpoint_model_mappings_model_definition_id ON endpoint_model_mappings (model_definition_id);
CREATE INDEX index_endpoint_tags_endpoint_id ON endpoint_tags (endpoint_id);
CREATE INDEX index_trace_metrics_request_id ON trace_metrics (request_id);
CREATE UNIQUE INDEX unique_endpoint_model_linkage_mapping ON endpoint_model_mappings (endpoint_id, model_definition_id, linkage_type);
CREATE INDEX index_span_metrics_trace_id_span_id ON span_metrics (trace_id, span_id);
CREATE INDEX index_evaluation_datasets_created_time ON evaluation_datasets (created_time);
CREATE INDEX index_evaluation_datasets_name ON evaluation_datasets (name);
CREATE INDEX idx_webhooks_name ON webhooks (name);
CREATE INDEX idx_webhooks_status ON webhooks (status);
CREATE TRIGGER prevent_secrets_aad_mutation
BEFORE UPDATE ON secrets
FOR EACH ROW
WHEN OLD.secret_id != NEW.secret_id OR OLD.secret_name != NEW.secret_name
BEGIN
    SELECT RAISE(ABORT, 'secret_id and secret_name are immutable (used as AAD in encryption)');
END;
CREATE INDEX index_model_definitions_provider ON model_definitions (provider);
CREATE INDEX index_model_definitions_secret_id ON model_definitions (secret_id);
CREATE INDEX index_jobs_name_status_creation_time ON jobs (job_name, workspace, status, creation_time);
CREATE INDEX idx_experiments_workspace ON experiments (workspace);
CREATE INDEX idx_registered_models_workspace ON registered_models (workspace);
CREATE INDEX idx_experiments_workspace_creation_time ON experiments (workspace, creation_time);
CREATE INDEX idx_evaluation_datasets_workspace ON evaluation_datasets (workspace);
CREATE INDEX idx_webhooks_workspace ON webhooks (workspace);
CREATE INDEX idx_secrets_workspace ON secrets (workspace);
CREATE INDEX idx_endpoints_workspace ON endpoints (workspace);
CREATE INDEX idx_model_definitions_workspace ON model_definitions (workspace);
CREATE INDEX idx_budget_policies_workspace ON budget_policies (workspace);
CREATE INDEX index_issues_experiment_id ON issues (experiment_id);
CREATE INDEX index_issues_source_run_id ON issues (source_run_id);
CREATE INDEX index_issues_status ON issues (status);
CREATE INDEX index_metrics_run_uuid_key_step ON metrics (run_uuid, "key", step);
CREATE INDEX idx_guardrails_workspace ON guardrails (workspace);
CREATE INDEX idx_guardrails_scorer ON guardrails (scorer_id, scorer_version);
CREATE INDEX idx_guardrail_configs_endpoint_id ON guardrail_configs (endpoint_id);
CREATE INDEX idx_guardrail_configs_guardrail_id ON guardrail_configs (guardrail_id);
CREATE INDEX idx_model_version_tags_workspace_name_version ON model_version_tags (workspace, name, version);
CREATE INDEX idx_registered_model_tags_workspace_name ON registered_model_tags (workspace, name);
CREATE INDEX index_label_schemas_experiment_id ON label_schemas (experiment_id);
CREATE INDEX index_review_queues_experiment_id ON review_queues (experiment_id);
CREATE INDEX index_review_queue_users_user_id ON review_queue_users (user_id);
CREATE INDEX index_review_queue_items_queue_id_status ON review_queue_items (queue_id, status);
CREATE INDEX index_review_queue_items_item_id ON review_queue_items (item_id);
CREATE INDEX index_review_queue_label_schemas_schema_id ON review_queue_label_schemas (schema_id);
CREATE INDEX idx_mcp_server_versions_latest ON mcp_server_versions (workspace, name, status, version_major DESC, version_minor DESC, version_patch DESC);
CREATE INDEX ix_mcp_access_endpoints_server_name ON mcp_access_endpoints (workspace, server_name);
CREATE INDEX ix_mcp_access_endpoints_version ON mcp_access_endpoints (workspace, server_name, server_version);
CREATE INDEX ix_mcp_access_endpoints_alias ON mcp_access_endpoints (workspace, server_name, server_alias);
CREATE INDEX idx_budget_policies_target_value ON budget_policies (target_value);
CREATE INDEX index_trace_info_experiment_id_timestamp_ms ON trace_info (experiment_id, timestamp_ms);
CREATE INDEX index_trace_info_timestamp_ms_request_id ON trace_info (timestamp_ms, request_id);
CREATE INDEX index_assessments_assessment_type ON assessments (assessment_type);
CREATE INDEX index_assessments_trace_id_created_timestamp ON assessments (trace_id, created_timestamp);
CREATE INDEX index_assessments_run_id_created_timestamp ON assessments (run_id, created_timestamp);
CREATE INDEX index_assessments_last_updated_timestamp ON assessments (last_updated_timestamp);
CREATE INDEX index_spans_experiment_id_status_type ON spans (experiment_id, status, type);
CREATE INDEX index_spans_experiment_id_start_time ON spans (experiment_id, start_time_unix_nano);
CREATE INDEX index_spans_experiment_id_duration ON spans (experiment_id, duration_ns);
CREATE INDEX index_spans_experiment_id_type_status ON spans (experiment_id, type, status);
CREATE INDEX index_trace_info_experiment_id_session_id ON trace_info (experiment_id, session_id);
CREATE INDEX idx_trace_rollups_lookup ON sql_trace_metric_daily_rollups (experiment_id, rollup_day, metric_name, grouping_set, trace_status);
CREATE INDEX idx_span_cost_rollups_lookup ON sql_span_cost_daily_rollups (experiment_id, rollup_day, metric_name, grouping_set, model_name, model_provider);
CREATE INDEX idx_assessment_rollups_lookup ON sql_assessment_daily_rollups (experiment_id, rollup_day, metric_name, grouping_set);
CREATE INDEX idx_spans_cost_trace_time_cover ON spans (trace_id, start_time_unix_nano);
CREATE INDEX idx_spans_cost_exp_time_cover ON spans (experiment_id, start_time_unix_nano);
CREATE INDEX idx_assessments_exp_trace_ts ON assessments (experiment_id, trace_timestamp_ms);
CREATE INDEX idx_assessments_exp_trace_ts_name ON assessments (experiment_id, trace_timestamp_ms, name);
CREATE INDEX idx_assessments_exp_name_valid ON assessments (experiment_id, name, valid);
CREATE INDEX index_job_locks_job_id ON job_locks (job_id);
CREATE INDEX index_jobs_status_lease_expires_at ON jobs (status, lease_expires_at);
COMMIT;
