"""Every field with its unit and default. Other configs override what differs."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
  config = ConfigDict()
  config.seed = 42

  config.model = ConfigDict()
  # A Hugging Face directory, a .gguf file, "package:NAME/FILE" inside an installed
  # package, or "preset:NAME" for random weights of a preset in models/presets.py.
  config.model.weights = ""
  # Architecture that the weights must have, by name; `compile` then needs no weights.
  config.model.preset = ""
  # "bytes", tokenizer.json, its directory or a .gguf; empty: beside the weights.
  config.model.tokenizer = ""
  config.model.param_dtype = "float32"
  config.model.compute_dtype = "float32"
  config.model.remat = True  # recompute each layer in the backward pass
  config.model.attention = "auto"  # "splash", the TPU kernel; "dense"; "auto": by the device
  config.model.attention_block = 1024  # positions that the kernel takes at a time

  # Low-rank adapters on every projection, trained beside frozen weights.
  config.lora = ConfigDict()
  config.lora.rank = 0  # 0: all weights are trained
  config.lora.alpha = 16.0  # changes are scaled by alpha / rank

  # Devices along each axis; one may be 0, for all that are left (training/mesh.py).
  config.mesh = ConfigDict()
  config.mesh.replica = 1  # copies, a multiple of the slices
  config.mesh.fsdp = 0  # rows and parameters
  config.mesh.tensor = 1  # heads, feed-forward layer, vocabulary
  config.mesh.context = 1  # positions of a row

  config.prompt = ConfigDict()
  config.prompt.chat = "chatml"  # personas/chat_formats.json
  config.prompt.format = "default"  # personas/prompt_formats.json

  config.data = ConfigDict()
  config.data.space = ""  # JSON of the poles that the records are labelled in; empty: AlignX's
  # A JSON list of records in the published schema, a directory that prepare_data.py wrote, or
  # "simulated".
  config.data.path = ""
  # Records without 'Preference Direction' are labelled by what their 'profile' says.
  config.data.profile_labels = False
  config.data.train_records = config_dict.placeholder(int)  # None: all; simulated: required
  config.data.test_records = config_dict.placeholder(int)  # likewise
  config.data.validation_records = 500  # the most on which a head's P̃ is calibrated
  # Simulated users state an age and a gender; the probability that their preferences follow.
  config.data.demographics = config_dict.placeholder(float)  # None: they state none
  config.data.test_share = 0.5  # of posts, for a JSON list
  # Above 1 the small sources of a prepared set come more often: shares ∝ size^(1/temperature).
  config.data.temperature = 1.0
  # The most processes of a host that tokenise and pack; 0: the main one does.
  config.data.workers = 0

  # What training shows of a persona (personas/persona.py).
  config.history = ConfigDict()
  config.history.policy = "release"  # "release": 0–4 comments and pairs; "all"; "fixed": items
  config.history.items = 0  # for "fixed"
  config.history.kinds = ("ugc", "pair", "demo")
  config.history.order = "kept"  # "kept": oldest first; "reversed"; "shuffled"

  # Sizes of a packed row, in tokens and examples.
  config.regions = ConfigDict()
  # Tokens of a row, "8192", to take the sizes that prepare_data.py proposed for the data.
  config.regions.layout = ""
  config.regions.context = 1024
  config.regions.response = 256
  config.regions.examples = 16
  # With a learned bridge or a latent variable instead of `context`: prompts without the persona,
  # and personas.
  config.regions.prompt = 512
  config.regions.persona = 1024
  config.regions.parts = 64  # the most acts and other parts of personas in a row

  config.objective = ConfigDict()
  # "ica": π(y|x,P); "pba": π(y|x,P̃). Baselines: "dpo": π(y|x), the same for every user; "vpl":
  # π(y|x,z), of a latent variable z inferred from the user's pairs.
  config.objective.name = "ica"
  # "sigmoid": DPO; "ipo"; "hinge"; "simpo", without a reference (objectives/losses.py).
  config.objective.loss = "sigmoid"
  config.objective.beta = 0.1  # β, per nat; of "simpo" the rewards' scale, usually 2 or more
  config.objective.label_smoothing = 0.0  # of "sigmoid": share of labels taken to be wrong
  config.objective.target_margin = 0.0  # γ of "simpo", in units of its rewards
  # α of the chosen response's cross-entropy per token, beside any loss; keeps a policy fluent.
  config.objective.likelihood_weight = 0.0
  # "age", "gender" or a pole: groups of these weigh alike in the loss, whatever their sizes.
  config.objective.groups = config_dict.placeholder(str)
  # With groups: η of group DRO, per nat: the worse a group's loss, the more it comes to weigh.
  config.objective.group_step = config_dict.placeholder(float)

  # What stands between persona and response in PBA.
  config.bridge = ConfigDict()
  # "text": P̃ of the history's labels, as text; "head": inferred by a learned head, as tokens.
  config.bridge.kind = "text"
  # For "text": workdir of a run whose head infers P̃ instead of the labels.
  config.bridge.inferred_by = ""
  config.bridge.threshold = 0.3  # probability from which such a pole is stated
  config.bridge.space = ""  # JSON of the poles of the head; empty: the data's space
  config.bridge.start = ""  # workdir of a run whose model and bridge this one starts from
  config.bridge.size = 128  # A, width of the head's queries and keys
  config.bridge.learning_rate = 1e-2  # peak, of the bridge's own parameters
  config.bridge.label_weight = 0.3  # λ, of the head's cross-entropy, in nats a person
  config.bridge.act_weight = 1.0  # relative to it, of that of each act with its own directions
  config.bridge.balance = 0.5  # directions weigh frequency^-balance in it: 0 none, 1 whole
  # Share of labelled examples whose policy reads the label, at the first step and from this
  # share of the steps on.
  config.bridge.forcing = (1.0, 0.0)
  config.bridge.forcing_share = 0.8
  config.bridge.dpo_gradient = True  # the DPO loss trains the head too
  config.bridge.alone = False  # train the bridge beside a frozen model
  config.bridge.new_only = False  # and of it the dimensions alone that bridge.start has not

  # The latent user variable z of "vpl" (models/latent.py).
  config.latent = ConfigDict()
  config.latent.size = 16  # Z, its dimensions
  config.latent.tokens = 4  # soft tokens of a prompt
  config.latent.width = 128  # M, of the encoder of pairs
  config.latent.learning_rate = 1e-2  # peak, of the encoder's and the soft tokens' parameters
  config.latent.kl_weight = 1e-2  # of the divergence from the prior, in nats a user
  config.latent.annealing_share = 0.5  # of the steps, in which that weight rises from 0

  config.reference = ConfigDict()
  # "cached": log-probs computed once and kept; "online": computed in each step by the policy
  # without its adapter (config.lora).
  config.reference.kind = "cached"
  config.reference.directory = ""  # where reference log-probs are shared; empty: the workdir

  config.optimizer = ConfigDict()
  config.optimizer.learning_rate = 5e-7  # peak
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.epsilon = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1.0
  config.optimizer.warmup_share = 0.1  # of all steps
  config.optimizer.final_share = 0.1  # of the peak, at the end of the cosine

  config.train = ConfigDict()
  config.train.epochs = 1
  config.train.steps = 0  # 0: as many as the epochs need
  config.train.rows = 8  # packed rows of a step, over all devices
  config.train.accumulation = 1  # parts a step's rows are processed in
  config.train.head_chunk = 128  # response positions at a time in the head
  config.train.log_every = 1  # steps
  config.train.devices = 0  # 0: all
  config.train.checkpoint_every = 500  # steps
  # Kept: so many of the last, each of a multiple of so many steps, and the best by accuracy.
  config.train.keep_checkpoints = 2
  config.train.keep_every = 0  # 0: none
  # Where a new run begins instead of the model's weights: the workdir of another, or a
  # checkpoint in it; with its optimizer and its place in the data (training/loop.py).
  config.train.restore = ""
  config.train.may_differ = ()  # fields that may, from the run that is gone on with
  config.train.stop_after_skipped = 3  # steps in a row that are not finite; 1: none overlap
  config.train.spike_factor = 10.0  # of the usual gradient norm: then the examples are logged
  config.train.log_text = False  # logs show what users wrote, not only ids of examples
  config.train.profile = (0, 0)  # first step and end of a profiler's window
  config.train.barrier_seconds = 300.0  # that hosts wait for one another, and for a step

  config.eval = ConfigDict()
  config.eval.rows = 8  # packed rows of an evaluation batch
  config.eval.every = 0  # steps between evaluations on the validation split; 0: none
  config.eval.protocols = ("matched", "release", "unconditioned")

  # An OpenAI-compatible chat endpoint as a judge (`win_rate --judge=endpoint`).
  config.judge = ConfigDict()
  config.judge.url = ""  # such as "http://localhost:8000/v1"
  config.judge.model = ""
  config.judge.key_variable = "JUDGE_API_KEY"  # environment variable of the key, if it needs one
  config.judge.timeout = 60.0  # seconds, of one attempt
  config.judge.attempts = 5  # at one question
  config.judge.backoff = 1.0  # seconds before the second, twice as many before each next one
  config.judge.requests_per_minute = 60.0  # 0: as fast as it answers
  config.judge.parallel = 4  # questions asked at once
  config.judge.max_tokens = 16  # of a reply
  config.judge.price_in = config_dict.placeholder(float)  # of a million tokens; required
  config.judge.price_out = config_dict.placeholder(float)  # likewise
  config.judge.max_cost = 1.0  # in the same currency, of all that the cache of replies has cost
  config.lock()  # a misspelt field in a config or on the command line is an error
  return config
