// The page: which study is open, what is asked of it, and everything that both panels share.
"use strict";

medvl.App = class {
  constructor(source) {
    this.source = source;
    this.get = (id) => document.getElementById(id);
    this.panels = [new medvl.Panel(0, this)];
    this.active = this.panels[0];
    this.study = null;
    this.info = null;
    this.volume = null;
    this.view = 3;
    this.scores = new Map(); // model -> what the source said
    this.asking = new Map(); // panel -> what stops its request
    this.opened = 0; // counts, so that an answer for a study that was left is dropped
  }

  async start() {
    this.listen();
    this.get("panels").append(this.panels[0].root);
    try {
      this.state = await this.source.state();
      await this.panels[0].start();
    } catch (error) {
      this.panels[0].fail(`The page cannot begin: ${error.message}`);
      this.status(`The page cannot begin: ${error.message}`);
      return;
    }
    this.get("notice").textContent = this.state.notice;
    this.get("drop-box").hidden = !this.source.canOpen;
    this.get("phrases").replaceChildren(...this.state.phrases.map((phrase) => medvl.make("option", { value: phrase })));
    this.offerModels();
    this.listStudies();
    this.watchStudies();
    if (this.state.phrases.length) this.panels[0].input.value = this.state.phrases[0];
    if (this.state.phrases.length > 1) await this.setCompare(true);
    const good = this.state.studies.filter((one) => !one.error);
    for (const [i, one] of (good.length ? good : this.state.studies.slice(0, 1)).entries()) {
      await this.open(one.id);
      if (this.info || this.opened !== i + 1) return; // the first that can be read, or what was chosen meanwhile
    }
  }

  listen() {
    const on = (id, event, act) => this.get(id).addEventListener(event, act);
    on("theme", "click", () => this.switchTheme());
    on("help-open", "click", () => this.get("help").showModal());
    on("help-close", "click", () => this.get("help").close());
    on("window", "change", (event) => this.chooseWindow(Number(event.target.value)));
    for (const id of ["level", "width"]) {
      on(id, "change", () => {
        const level = Number(this.get("level").value);
        const width = Math.max(1, Number(this.get("width").value));
        this.setWindow(level - width / 2, level + width / 2);
      });
    }
    for (const id of ["opacity", "threshold"]) {
      on(id, "input", () => {
        this.get(`${id}-out`).textContent = `${this.get(id).value} %`;
        this.restyle();
      });
    }
    on("map-on", "change", () => this.restyle());
    on("cross-on", "change", () => this.info && this.panels.forEach((panel) => panel.crosshair(this.get("cross-on").checked)));
    on("zoom-in", "click", () => this.zoom(1.25));
    on("zoom-out", "click", () => this.zoom(0.8));
    on("reset", "click", () => this.panels.forEach((panel) => this.info && panel.fit()));
    on("compare", "click", () => this.setCompare(this.panels.length === 1));
    on("linked", "change", () => this.get("linked").checked && this.asked(this.active, this.active.query));
    on("open-file", "click", () => this.get("file").click());
    on("file", "change", (event) => this.openFiles([...event.target.files]));
    document.addEventListener("keydown", (event) => this.key(event), true);
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.get("drop-over").hidden = !this.source.canOpen;
    });
    document.addEventListener("dragleave", (event) => {
      if (!event.relatedTarget) this.get("drop-over").hidden = true;
    });
    document.addEventListener("drop", async (event) => {
      event.preventDefault();
      this.get("drop-over").hidden = true;
      if (this.source.canOpen) this.openFiles(await medvl.droppedFiles(event.dataTransfer));
    });
  }

  status(text) {
    this.get("status").textContent = text;
  }

  // --- studies ---------------------------------------------------------------------------------------------------------------------------

  listStudies() {
    const make = medvl.make;
    const rows = this.state.studies.map((one) => {
      const button = make("button", { type: "button", "aria-current": one.id === this.study ? "true" : null, onclick: () => this.open(one.id) }, one.name);
      return make("li", {}, button, ...(one.error ? [make("p", { class: "error" }, `Cannot be read: ${one.error}`)] : []));
    });
    const list = this.get("studies");
    const focused = [...list.querySelectorAll("button")].indexOf(document.activeElement);
    list.replaceChildren(...rows);
    if (focused >= 0) list.querySelectorAll("button")[focused]?.focus();
    this.get("studies-box").hidden = !this.source.canOpen && rows.length < 2;
  }

  /** Ask again as long as studies are still being checked. */
  async watchStudies() {
    while (this.source.canOpen && this.state.studies.length > 1 && this.state.studies.some((one) => !one.checked)) {
      await new Promise((resolve) => setTimeout(resolve, 1500));
      try {
        const { studies } = await this.source.state();
        if (JSON.stringify(studies) !== JSON.stringify(this.state.studies)) {
          this.state.studies = studies;
          this.listStudies();
        }
      } catch {
        return; // the server has ended; whatever is asked next says so
      }
    }
  }

  async open(study) {
    const turn = ++this.opened;
    this.study = study;
    this.info = null;
    this.scores.clear();
    this.listStudies();
    const name = this.state.studies[study].name;
    this.get("study-name").textContent = name;
    document.title = `${name} · medvl view`;
    this.status(`Reading ${name}…`);
    for (const panel of this.panels) {
      panel.fail(null);
      panel.wait("Reading the image…");
      panel.told(null);
    }
    try {
      const info = await this.source.study(study);
      const content = await this.source.image(study);
      if (turn !== this.opened) return;
      const { low, high } = info.windows[0];
      const volume = await niivue.NVImage.new(content, "image.nii", "gray", 1, null, low, high, true);
      if (turn !== this.opened) return;
      if (info.kind !== this.kind) this.panels[0].model = info.model; // of models for films and for CT the one that reads it
      this.kind = info.kind;
      this.offerModels();
      this.info = info;
      this.volume = volume;
      this.get("cross-on").checked = info.kind === "ct"; // across a film it would be in the way
    } catch (error) {
      if (turn !== this.opened) return;
      for (const panel of this.panels) {
        panel.wait(null);
        panel.fail(error.message);
      }
      const one = this.state.studies[study];
      one.error = error.message;
      one.checked = true;
      this.listStudies();
      this.showScores();
      this.status(`${name} cannot be shown: ${error.message}`);
      return;
    }
    this.windowBefore3d = null;
    if (this.view === 4) this.view = 3;
    this.offerViews();
    this.offerWindows();
    for (const panel of this.panels) this.showIn(panel);
    this.status(`${name} is shown.`);
    this.loadScores(turn);
    for (const panel of this.panels) {
      panel.query = panel.query || panel.typed();
      this.look(panel);
    }
  }

  showIn(panel) {
    panel.wait(null);
    panel.show(this.info, this.volume);
    panel.setView(this.info.kind === "xray" ? 0 : this.view);
  }

  async openFiles(files) {
    if (!files.length) return;
    const size = files.reduce((sum, file) => sum + file.size, 0);
    if (size > this.state.maxUpload) {
      this.status(`Not opened: ${medvl.size(size)} are more than the ${medvl.size(this.state.maxUpload)} that are taken at once; name the file on the command line, or raise --max-upload.`);
      return;
    }
    try {
      const { added, studies } = await this.source.open(files, (text) => this.status(text));
      this.state.studies = studies;
      await this.open(added[0]);
    } catch (error) {
      this.status(`Not opened: ${error.message}`);
    }
  }

  // --- models and findings ---------------------------------------------------------------------------------------------------------------

  offerModels() {
    for (const panel of this.panels) {
      panel.modelSelect.replaceChildren(...this.state.models.map((one, i) => medvl.make("option", { value: i }, one.name)));
      panel.modelSelect.value = panel.model;
      panel.modelSelect.hidden = this.state.models.length < 2;
    }
  }

  modelChosen(panel, model) {
    panel.model = model;
    this.showScores();
    this.loadScores(this.opened);
    this.look(panel);
  }

  usedModels() {
    return [...new Set(this.panels.map((panel) => panel.model))];
  }

  async loadScores(turn) {
    for (const model of this.usedModels()) {
      if (this.scores.has(model) || !this.info) continue;
      try {
        const scores = await this.source.scores(this.study, model);
        if (turn !== this.opened) return;
        this.scores.set(model, scores);
      } catch (error) {
        if (turn !== this.opened) return;
        this.scores.set(model, { error: error.message, findings: [], notes: [], unfamiliar: [] });
      }
    }
    if (turn === this.opened) this.showScores();
  }

  showScores() {
    const make = medvl.make;
    const models = this.usedModels().filter((model) => this.scores.has(model));
    const told = models.map((model) => this.scores.get(model));
    const several = models.length > 1;
    const names = [...new Set(told.flatMap((one) => one.findings.map((row) => row.finding)))];
    const best = (name) => Math.max(...told.map((one) => one.findings.find((row) => row.finding === name)?.score ?? -Infinity));
    names.sort((a, b) => best(b) - best(a));
    const body = names.map((name) => {
      const cells = told.map((one) => {
        const row = one.findings.find((each) => each.finding === name);
        if (!row) return make("td", {}, "–");
        const inside = row.score >= 0 && row.score <= 1;
        const meter = inside && !several ? [make("meter", { min: 0, max: 1, value: row.score, "aria-hidden": "true" })] : [];
        const kept = row.set ? [make("small", {}, row.set.length === 2 ? "undecided" : row.set.length ? row.set[0] : "unlike validation")] : [];
        return make("td", {}, row.score.toFixed(2), ...meter, ...kept);
      });
      const current = this.panels.some((panel) => panel.query && panel.query.kind === "finding" && panel.query.what === name);
      const button = make("button", { type: "button", "aria-current": current ? "true" : null, title: "Show its map", onclick: () => this.findingChosen(name) }, name.replaceAll("_", " "));
      return make("tr", {}, make("td", {}, button), ...cells);
    });
    const table = this.get("findings");
    const head = several ? [make("tr", {}, make("th", { scope: "col" }, "finding"), ...models.map((model) => make("th", { scope: "col" }, this.state.models[model].name)))] : [];
    table.tHead.replaceChildren(...head);
    table.tBodies[0].replaceChildren(...body);
    const said = (model, text) => (several ? `${this.state.models[model].name}: ${text}` : text);
    const errors = models.filter((model) => this.scores.get(model).error).map((model) => said(model, this.scores.get(model).error));
    const calibrated = told.length && told.every((one) => one.calibrated);
    const words = calibrated ? "Probabilities, calibrated on validation studies; below each what cannot be ruled out." : "Scores, not calibrated: compare studies, not findings.";
    this.get("findings-note").textContent = errors.length ? errors.join("; ") : told.length ? words : this.info ? "Encoding the image…" : "–";
    const unfamiliar = models.flatMap((model) => this.scores.get(model).unfamiliar.map((reason) => said(model, reason)));
    this.get("unfamiliar").hidden = !unfamiliar.length;
    this.get("unfamiliar").textContent = `Not what the model was made for: ${unfamiliar.join("; ")}`;
    const notes = this.info ? [...new Set([...this.info.notes, ...told.flatMap((one) => one.notes)])] : [];
    this.get("notes-box").hidden = !notes.length;
    this.get("notes").replaceChildren(...notes.map((note) => make("li", {}, note)));
  }

  findingChosen(name) {
    const panels = this.linked() ? this.panels : [this.active];
    for (const panel of panels) {
      panel.input.value = "";
      this.ask(panel, { kind: "finding", what: name });
    }
  }

  // --- maps ------------------------------------------------------------------------------------------------------------------------------

  linked() {
    return this.panels.length > 1 && this.get("linked").checked;
  }

  /** A phrase was typed, or taken away. */
  asked(panel, query) {
    this.ask(panel, query);
    if (!this.linked()) return;
    for (const other of this.panels) {
      if (other === panel) continue;
      other.input.value = panel.input.value;
      this.ask(other, query);
    }
  }

  ask(panel, query) {
    const same = JSON.stringify(query) === JSON.stringify(panel.query);
    if (same && (panel.found || !query)) return;
    panel.query = query;
    this.showScores();
    this.look(panel);
  }

  /** Show the map of what a panel is asked for. */
  async look(panel) {
    this.asking.get(panel)?.abort();
    if (!this.info) return;
    const query = panel.query;
    if (!query) {
      panel.wait(null);
      if (panel.found) this.status("No map is shown.");
      await panel.lay(null);
      return;
    }
    const stop = new AbortController();
    this.asking.set(panel, stop);
    const turn = this.opened;
    const words = query.what.replaceAll("_", " ");
    panel.wait("Looking…");
    try {
      const found = await this.source.map(this.study, panel.model, query, stop.signal);
      if (stop.signal.aborted || turn !== this.opened) return;
      await panel.lay(found);
      panel.wait(null);
      this.status(found.peak ? `Map of “${words}”: highest, ${found.peak.value.toFixed(2)}, at ${found.peak.words}.` : `Map of “${words}”: no place stands out.`);
    } catch (error) {
      if (stop.signal.aborted || turn !== this.opened) return;
      panel.wait(null);
      await panel.lay(null);
      panel.where.textContent = `No map: ${error.message}`;
      this.status(`No map of “${words}”: ${error.message}`);
    }
  }

  style() {
    return { opacity: Number(this.get("opacity").value) / 100, threshold: Number(this.get("threshold").value) / 100, on: this.get("map-on").checked, cross: this.get("cross-on").checked };
  }

  restyle() {
    cancelAnimationFrame(this.restyling);
    this.restyling = requestAnimationFrame(() => this.panels.forEach((panel) => panel.styled()));
  }

  goToStrongest(panel) {
    const mm = panel.strongest();
    if (!mm) return;
    this.get("cross-on").checked = true;
    for (const each of this.panels) {
      each.moveTo(mm);
      each.crosshair(true);
    }
    const place = this.info.kind === "xray" ? panel.found.peak.words : `slice ${panel.slice() + 1} of ${panel.sliceCount()} from below, ${medvl.directions(mm)}`;
    this.status(`At ${place}.`);
  }

  toSlice(index) {
    for (const panel of this.panels) panel.toSlice(index);
  }

  /** The crosshair of a panel has moved: the other follows. */
  moved(panel) {
    if (this.following || this.panels.length < 2) return;
    this.following = true;
    for (const other of this.panels) {
      if (other === panel || !other.info) continue;
      other.nv.scene.pan2Dxyzmm = [...panel.nv.scene.pan2Dxyzmm];
      other.moveTo(panel.nv.frac2mm(panel.nv.scene.crosshairPos));
    }
    this.following = false;
  }

  // --- two at once -----------------------------------------------------------------------------------------------------------------------

  async setCompare(on) {
    if (on === this.panels.length > 1) return;
    this.get("compare").setAttribute("aria-pressed", String(on));
    this.get("linked-field").hidden = !on;
    this.get("panels").classList.toggle("two", on);
    if (!on) {
      const left = this.panels.pop();
      this.asking.get(left)?.abort();
      left.root.remove();
      left.nv.gl.getExtension("WEBGL_lose_context")?.loseContext(); // gives the graphics card its memory back at once
      this.activate(this.panels[0]);
      this.showScores();
      return;
    }
    const panel = new medvl.Panel(1, this);
    const several = this.state.models.length > 1;
    panel.model = several ? (this.panels[0].model + 1) % this.state.models.length : this.panels[0].model;
    this.get("linked").checked = several;
    panel.input.value = several ? this.panels[0].input.value : this.state.phrases[1] || "";
    panel.query = several ? this.panels[0].query : panel.typed();
    this.panels.push(panel);
    this.get("panels").append(panel.root);
    await panel.start();
    this.panels[0].nv.broadcastTo([panel.nv], { "2d": true, "3d": true });
    panel.nv.broadcastTo([this.panels[0].nv], { "2d": true, "3d": true });
    this.offerModels();
    if (!this.info) return;
    const mm = this.panels[0].nv.frac2mm(this.panels[0].nv.scene.crosshairPos);
    this.showIn(panel);
    panel.moveTo(mm);
    this.loadScores(this.opened);
    await this.look(panel);
  }

  activate(panel) {
    this.active = panel;
    for (const each of this.panels) each.root.classList.toggle("active", each === panel);
  }

  // --- view and window -------------------------------------------------------------------------------------------------------------------

  offerViews() {
    const make = medvl.make;
    const box = this.get("views");
    box.hidden = this.info.kind === "xray";
    box.replaceChildren(...medvl.VIEWS.map(([name, type], i) => make("button", { type: "button", "aria-pressed": String(type === this.view), "aria-keyshortcuts": String(i + 1), onclick: () => this.setView(type) }, name)));
  }

  setView(type) {
    if (!this.info || this.info.kind === "xray") return;
    if ((type === 4) !== (this.view === 4)) this.turnTo3d(type === 4);
    this.view = type;
    [...this.get("views").children].forEach((button, i) => button.setAttribute("aria-pressed", String(medvl.VIEWS[i][1] === type)));
    for (const panel of this.panels) panel.setView(type);
  }

  /** In 3D a window of slices shows the skin alone: bones take its place there, and it comes back afterwards. */
  turnTo3d(enter) {
    const now = [this.volume.cal_min, this.volume.cal_max];
    const [low, high] = enter ? medvl.BONES_IN_3D : this.windowBefore3d || now;
    this.windowBefore3d = enter ? now : null;
    this.setWindow(low, high);
  }

  offerWindows() {
    const options = this.info.windows.map((one, i) => medvl.make("option", { value: i }, one.name));
    this.get("window").replaceChildren(...options, medvl.make("option", { value: -1, hidden: true }, "Own"));
    this.sayWindow(this.info.windows[0].low, this.info.windows[0].high);
  }

  chooseWindow(index) {
    const one = this.info && this.info.windows[index];
    if (one) this.setWindow(one.low, one.high);
  }

  setWindow(low, high) {
    if (!this.volume) return;
    this.volume.cal_min = low;
    this.volume.cal_max = high;
    this.sayWindow(low, high);
    for (const panel of this.panels) panel.windowed();
  }

  /** The mouse has changed the window in one panel; they share the image, so the other is only drawn. */
  windowChanged(low, high, panel) {
    if (!this.info) return;
    this.sayWindow(low, high);
    for (const other of this.panels) if (other !== panel) other.windowed();
  }

  sayWindow(low, high) {
    const near = this.info.windows.findIndex((one) => Math.abs(one.low - low) < 0.5 && Math.abs(one.high - high) < 0.5);
    this.get("window").value = String(near);
    this.get("level").value = Math.round((low + high) / 2);
    this.get("width").value = Math.round(high - low);
  }

  zoom(factor) {
    if (this.info) for (const panel of this.panels) panel.zoom(factor);
  }

  switchTheme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    medvl.remember("theme", root.dataset.theme);
  }

  // --- keys ------------------------------------------------------------------------------------------------------------------------------

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.get("help").open) return;
    const at = event.target;
    const onCanvas = at.tagName === "CANVAS";
    if (onCanvas && event.key !== "Tab") event.stopPropagation(); // NiiVue has keys of its own, which the help does not name
    const typing = at.matches("input:not([type=checkbox]), select, textarea");
    if (typing) {
      if (event.key === "Escape") at.blur();
      return;
    }
    const act = this.actions()[event.key];
    const letter = event.key.length === 1;
    if (!act || (letter && !this.get("keys-on").checked && event.key !== "?")) return;
    if (!letter && !onCanvas && at !== document.body) return; // arrows serve buttons and the bar
    event.preventDefault();
    act();
  }

  actions() {
    const click = (id) => () => this.get(id).click();
    const slide = (id, by) => () => {
      this.get(id).value = Number(this.get(id).value) + by;
      this.get(id).dispatchEvent(new Event("input"));
    };
    const views = Object.fromEntries(medvl.VIEWS.map(([, type], i) => [String(i + 1), () => this.setView(type)]));
    return {
      ...views,
      "/": () => this.active.input.focus(),
      "?": () => this.get("help").showModal(),
      ArrowUp: () => this.step(1),
      ArrowDown: () => this.step(-1),
      PageUp: () => this.step(10),
      PageDown: () => this.step(-10),
      g: () => this.goToStrongest(this.active),
      w: () => this.info && this.chooseWindow((Number(this.get("window").value) + 1) % this.info.windows.length),
      "+": () => this.zoom(1.25),
      "=": () => this.zoom(1.25),
      "-": () => this.zoom(0.8),
      0: click("reset"),
      m: click("map-on"),
      x: click("cross-on"),
      ",": slide("opacity", -10),
      ".": slide("opacity", 10),
      "[": slide("threshold", -5),
      "]": slide("threshold", 5),
      c: click("compare"),
      t: click("theme"),
    };
  }

  /** To another slice of the view that is shown; of all three, the axial one. */
  step(by) {
    if (!this.info || this.info.kind === "xray") return;
    const way = { 1: [0, by, 0], 2: [by, 0, 0] }[this.view] || [0, 0, by];
    this.panels[0].nv.moveCrosshairInVox(...way);
    this.panels[0].redraw();
  }
};

/** All files of what was dropped, folders opened. */
medvl.droppedFiles = async function (data) {
  const walk = async (entry) => {
    if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
    const reader = entry.createReader();
    const files = [];
    for (;;) {
      const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!part.length) return files;
      for (const one of part) files.push(...(await walk(one)));
    }
  };
  const entries = [...data.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  return entries.length ? (await Promise.all(entries.map(walk))).flat() : [...data.files];
};

medvl.size = (bytes) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;

/** Keep or get a choice; a page from disk, or a private window, may have nowhere to keep it. */
medvl.remember = function (name, value) {
  try {
    if (value === undefined) return localStorage.getItem(`medvl-${name}`);
    localStorage.setItem(`medvl-${name}`, value);
  } catch {
    return null;
  }
  return value;
};

document.documentElement.dataset.theme = medvl.remember("theme") || "";
if (location.protocol.startsWith("http")) history.replaceState(null, "", location.pathname); // the token need not stay in sight
medvl.app = new medvl.App(medvl.data ? new medvl.StaticSource(medvl.data) : new medvl.ServerSource());
medvl.app.start();
