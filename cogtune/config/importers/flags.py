"""Every flag of the supported programs: the key that it becomes, or a remark about it.

Sources: CogVideo's ``finetune/schemas/args.py``, CogKit's ``finetune/base/base_args.py`` and its ``config.yaml``,
diffusers' ``examples/cogvideo/train_cogvideox_*lora.py``, CogVideoX Factory's ``training/args.py``, and finetrainers'
``args.py``.
"""

from __future__ import annotations

from cogtune.config.importers.reading import Program

KEPT: dict[str, str] = {
    "training_type": "type",
    "output_dir": "output",
    "id_token": "id_token",
    "seed": "seed",
    "batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "checkpointing_steps": "checkpoint_every",
    "checkpointing_limit": "keep_checkpoints",
    "checkpoints_total_limit": "keep_checkpoints",
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "beta1": "beta1",
    "adam_beta1": "beta1",
    "beta2": "beta2",
    "adam_beta2": "beta2",
    "weight_decay": "weight_decay",
    "adam_weight_decay": "weight_decay",
    "epsilon": "epsilon",
    "adam_epsilon": "epsilon",
    "max_grad_norm": "max_grad_norm",
    "lr_num_cycles": "lr_cycles",
    "lr_power": "lr_power",
    "rank": "rank",
    "lora_alpha": "alpha",
    "skip_frames_start": "skip_start",
    "skip_frames_end": "skip_end",
    "caption_dropout_p": "caption_dropout",
    "guidance_scale": "sample_guidance",
}
"""Flags whose value becomes that of a key, unchanged."""

TOGETHER: dict[str, str] = {
    **dict.fromkeys(("model_path", "pretrained_model_name_or_path", "model_name", "model_type"), "model"),
    **dict.fromkeys(("data_root", "instance_data_root", "dataset_file", "dataset_name", "dataset_config"), "data"),
    **dict.fromkeys(("caption_column", "video_column", "image_column"), "columns"),
    **dict.fromkeys(("train_resolution", "video_resolution_buckets", "height", "width", "max_num_frames"), "size"),
    **dict.fromkeys(("height_buckets", "width_buckets", "frame_buckets"), "size"),
    **dict.fromkeys(("video_reshape_mode", "reshape_mode"), "reshape"),
    **dict.fromkeys(("train_steps", "max_train_steps", "train_epochs", "num_train_epochs"), "steps"),
    **dict.fromkeys(("mixed_precision", "transformer_dtype"), "precision"),
    **dict.fromkeys(("optimizer", "use_8bit", "use_8bit_adam", "use_8bit_bnb", "use_4bit", "use_torchao"), "optimizer"),
    **dict.fromkeys(("use_cpu_offload_optimizer", "beta3", "prodigy_beta3", "prodigy_decouple"), "optimizer"),
    **dict.fromkeys(("prodigy_use_bias_correction", "prodigy_safeguard_warmup"), "optimizer"),
    **dict.fromkeys(("lr_scheduler", "lr_warmup_steps", "scale_lr"), "schedule"),
    "target_modules": "targets",
    "gradient_checkpointing": "recompute",
    "nccl_timeout": "timeout",
    "report_to": "tracker",
    **dict.fromkeys(("do_validation", "validation_steps", "validation_dir", "validation_prompts"), "validation"),
    **dict.fromkeys(("validation_images", "validation_videos", "validation_prompt", "validation_epochs"), "validation"),
    **dict.fromkeys(("validation_prompt_separator", "validation_dataset_file"), "validation"),
    **dict.fromkeys(("validation_every_n_epochs", "validation_every_n_steps"), "validation"),
    **dict.fromkeys(("strategy", "offload_params_grads", "low_vram"), "memory"),
    **dict.fromkeys(("parallel_backend", "pp_degree", "dp_degree", "dp_shards", "cp_degree", "tp_degree"), "parallel"),
}
"""Flags that are read together with others, by topic."""

BETTER: dict[str, str] = {
    **dict.fromkeys(
        ("num_workers", "dataloader_num_workers"),
        "there are as many decoders as the cores allow; `workers` sets the number",
    ),
    "pin_memory": "batches are read from the cache; `pin_memory` in cogtune is for offload",
    "enable_slicing": "the VAE uses slicing and tiling when memory requires it (`vae_tiling`)",
    "enable_tiling": "the VAE uses slicing and tiling when memory requires it (`vae_tiling`)",
    "enable_model_cpu_offload": "sample videos adapt to the memory that is left",
    "use_dynamic_cfg": "dynamic guidance is used for the models whose public fine-tuning guide uses it",
    **dict.fromkeys(
        (
            "load_tensors",
            "precompute_conditions",
            "enable_precomputation",
            "precomputation_items",
            "precomputation_dir",
            "precomputation_once",
            "precomputation_reuse",
        ),
        "clips and captions are always encoded once before training, and again when one changes",
    ),
    "resume_from_checkpoint": "other programs' checkpoints cannot be resumed; `init_lora` starts from any LoRA",
    "push_to_hub": "`cogtune push` uploads a run, with a model card",
    "hub_model_id": "use `cogtune push RUN user/name`",
    "hub_token": "use `hf auth login`, and remove the token from the script",
    **dict.fromkeys(
        ("tracker_name", "logging_dir"), "metrics are saved in the run's folder; `cogtune report` shows them"
    ),
    **dict.fromkeys(("name4train", "log_level"), "a run is named by its `output`"),
    **dict.fromkeys(("init_timeout", "dataset_shuffle_buffer_size"), "nothing to set: detected automatically"),
    "remove_common_llm_caption_prefixes": "`cogtune dataset validate` reports captions with the same beginning",
    "dataset_type": "detected automatically",
    "gen_fps": "sample videos have the frame rate of training",
    "no_grad_sync_when_accumulating": "gradients are always accumulated before they are synchronized",
}
"""Flags that are no longer needed, and why."""

NOTHING: dict[str, str] = {
    "random_flip": "clips are not flipped: flipping mirrors text and motion",
    "noised_image_dropout": "conditioning images are not dropped; `image_noise` adds noise to them",
    "num_validation_videos": "each prompt gets one sample video",
    "num_validation_videos_per_prompt": "each prompt gets one sample video",
    "validation_heights": "sample videos have the training size",
    "validation_widths": "sample videos have the training size",
    "validation_num_frames": "sample videos have the training size",
    "validation_frame_rates": "sample videos have the frame rate of training",
    "allow_tf32": "matrix products use the run's precision",
    "revision": "the latest revision is used; to use another, download it and set `model` to its folder",
    "variant": "the repository's default weights are used",
    "cache_dir": "set HF_HOME for downloads; `cache_dir` in cogtune is the cache of encoded clips",
    "dataset_config_name": "the dataset's default configuration is used",
    "fps": "it does not select frames there; in cogtune, `fps` is the rate read from clips, with `sampling: head`",
    "enable_packing": "`buckets` trains at several sizes",
    "caption_dropout_technique": "a dropped caption is replaced by an empty one",
    **dict.fromkeys(
        ("text_encoder_dtype", "text_encoder_2_dtype", "text_encoder_3_dtype", "vae_dtype"),
        "the text encoder and the VAE use the run's precision",
    ),
    **dict.fromkeys(
        (
            "flow_weighting_scheme",
            "flow_logit_mean",
            "flow_logit_std",
            "flow_resolution_shifting",
            "flow_base_image_seq_len",
            "flow_max_image_seq_len",
            "flow_base_shift",
            "flow_max_shift",
            "flow_shift",
            "flow_mode_scale",
        ),
        "for flow-matching models, and CogVideoX is not one; see `timestep_sampling`",
    ),
    "layerwise_upcasting_modules": "a LoRA run keeps within the GPU's memory; see `base_precision`",
    "layerwise_upcasting_storage_dtype": "a LoRA run keeps within the GPU's memory; see `base_precision`",
    "image_resolution_buckets": "cogtune trains on clips, not on images",
}
"""Flags that have no counterpart, and what happens instead."""

_COGVIDEO = {
    "learning_rate": ["2e-5"],
    "lr_warmup_steps": ["100"],
    "lora_alpha": ["64"],
    "checkpointing_steps": ["200"],
    "checkpointing_limit": ["10"],
    "mixed_precision": ["no"],
}
"""What CogKit has taken over from CogVideo's scripts."""

DEFAULTS: dict[Program, dict[str, list[str]]] = {
    "CogVideo": {"train_epochs": ["10"], **_COGVIDEO},
    "CogKit": {"train_epochs": ["1"], **_COGVIDEO},
    "diffusers": {
        "num_train_epochs": ["1"],
        "train_batch_size": ["4"],
        "lora_alpha": ["128"],
        "optimizer": ["adam"],
        "lr_scheduler": ["constant"],
        "lr_warmup_steps": ["500"],
        "height": ["480"],
        "width": ["720"],
        "max_num_frames": ["49"],
    },
    "CogVideoX Factory": {
        "num_train_epochs": ["1"],
        "train_batch_size": ["4"],
        "rank": ["64"],
        "lora_alpha": ["64"],
        "optimizer": ["adam"],
        "lr_scheduler": ["constant"],
        "lr_warmup_steps": ["500"],
        "height": ["480"],
        "width": ["720"],
        "max_num_frames": ["49"],
    },
    "finetrainers": {
        "train_epochs": ["1"],
        "lora_alpha": ["64"],
        "lr_scheduler": ["cosine_with_restarts"],
    },
}
"""Defaults of each program that differ from those of cogtune."""

KNOWN = {*KEPT, *TOGETHER, *BETTER, *NOTHING}
"""All flags that are known."""

LAUNCH_KNOWN: dict[str, str] = {
    **dict.fromkeys(("multi_gpu", "gpu_ids", "num_processes", "nproc_per_node", "num_gpus"), "num_processes"),
    **dict.fromkeys(("nnodes", "num_machines"), "num_machines"),
    **dict.fromkeys(("config_file", "use_deepspeed", "zero_stage", "deepspeed_config_file"), "strategy"),
    "mixed_precision": "precision",
    **dict.fromkeys(
        ("standalone", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "master_addr", "master_port", "node_rank"), ""
    ),
    **dict.fromkeys(("main_process_port", "main_process_ip", "machine_rank", "same_network", "dynamo_backend"), ""),
}
"""Flags of launchers and the keys that they decide; empty for those about how processes connect."""
