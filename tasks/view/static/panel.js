// One image with one map: a NiiVue canvas, the phrase and model it shows, and the bar of its slices.
"use strict";

var medvl = medvl || {};

medvl.VIEWS = [["Axial", 0], ["Coronal", 1], ["Sagittal", 2], ["All", 3], ["3D", 4]]; // and NiiVue's number for each
medvl.COLOURS = { R: [88, 88, 190, 245, 255], G: [20, 20, 40, 110, 235], B: [140, 140, 110, 40, 90], A: [0, 255, 255, 255, 255], I: [0, 1, 85, 170, 255] };
medvl.MAP_TEXELS = 2 ** 22;
medvl.BONES_IN_3D = [150, 900]; // HU
medvl.NOWHERE = -1e4; // what a map has where the model did not look: below any threshold, so that nothing is drawn

/** An element with attributes and children; text is only ever text. */
medvl.make = function (tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
};

/** A NIfTI of float32 with what is not a number put below every threshold, in place. */
medvl.withoutGaps = function (buffer) {
  const start = new DataView(buffer).getFloat32(108, true); // vox_offset of the header
  const values = new Float32Array(buffer, start);
  for (let i = 0; i < values.length; i++) if (Number.isNaN(values[i])) values[i] = medvl.NOWHERE;
  return buffer;
};

medvl.Panel = class {
  constructor(number, app) {
    const make = medvl.make;
    this.number = number;
    this.app = app;
    this.model = 0;
    this.query = null;
    this.found = null; // what the source said of the query
    this.overlay = null;
    const named = number === 0 ? "image" : "second image";
    this.input = make("input", { type: "text", id: `phrase-${number}`, placeholder: "What to look for, e.g. left pleural effusion", "aria-label": `Phrase to look for in the ${named}`, list: "phrases", autocomplete: "off", spellcheck: "false", maxlength: "500" });
    this.modelSelect = make("select", { "aria-label": `Model of the ${named}` });
    this.clear = make("button", { type: "button", "aria-label": `No map in the ${named}` }, "Clear");
    this.form = make("form", { role: "search", "aria-label": `Phrase for the ${named}` }, this.input, this.modelSelect, this.clear);
    this.canvas = make("canvas", { tabindex: "0", role: "img", "aria-label": "Image" });
    this.sides = Object.fromEntries(["left", "right", "top", "bottom"].map((at) => [at, make("span", { class: `side ${at}`, "aria-hidden": "true" })]));
    this.busy = make("div", { class: "busy", hidden: true });
    this.failure = make("div", { class: "failure", hidden: true, role: "alert" });
    this.stage = make("div", { class: "stage" }, this.canvas, ...Object.values(this.sides), this.busy, this.failure);
    this.strip = make("canvas", { "aria-hidden": "true" });
    this.mark = make("i", {});
    this.bar = make("div", { class: "bar", role: "slider", tabindex: "0", "aria-label": "Axial slice, from the feet to the head", "aria-valuemin": "1" }, this.strip, this.mark);
    this.slices = make("div", { class: "slices", hidden: true }, "feet", this.bar, "head");
    this.jump = make("button", { type: "button", disabled: true, "aria-keyshortcuts": "g" }, "Strongest slice");
    this.where = make("span", { class: "where" });
    this.low = make("span", {});
    this.high = make("span", {});
    this.legend = make("span", { class: "legend", hidden: true }, this.low, make("i", { "aria-hidden": "true" }), this.high);
    this.here = make("div", { class: "here" });
    this.root = make("section", { class: "panel", "aria-label": number === 0 ? "First image" : "Second image" }, this.form, this.stage, this.slices, make("div", { class: "found" }, this.jump, this.where, this.legend), this.here);
    this.listen();
  }

  listen() {
    let wait = 0;
    this.input.addEventListener("input", () => {
      clearTimeout(wait);
      wait = setTimeout(() => this.app.asked(this, this.typed()), 350);
    });
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      clearTimeout(wait);
      this.app.asked(this, this.typed());
    });
    this.clear.addEventListener("click", () => {
      this.input.value = "";
      this.app.asked(this, null);
    });
    this.modelSelect.addEventListener("change", () => this.app.modelChosen(this, Number(this.modelSelect.value)));
    this.jump.addEventListener("click", () => this.app.goToStrongest(this));
    this.root.addEventListener("focusin", () => this.app.activate(this));
    this.root.addEventListener("pointerdown", () => this.app.activate(this));
    this.canvas.addEventListener("wheel", () => this.canvas.focus({ preventScroll: true }), { capture: true, passive: true });
    const slide = (event) => {
      const box = this.bar.getBoundingClientRect();
      const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.app.toSlice(Math.min(this.sliceCount() - 1, Math.floor(part * this.sliceCount())));
    };
    this.bar.addEventListener("pointerdown", (event) => {
      this.bar.setPointerCapture(event.pointerId);
      slide(event);
    });
    this.bar.addEventListener("pointermove", (event) => event.buttons && slide(event));
    this.bar.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
      const at = event.key === "Home" ? 0 : event.key === "End" ? this.sliceCount() - 1 : step ? this.slice() + step : null;
      if (at === null) return;
      event.preventDefault();
      event.stopPropagation();
      this.app.toSlice(at);
    });
    new ResizeObserver(() => this.drawBar()).observe(this.bar);
  }

  typed() {
    const what = this.input.value.trim().replace(/\s+/g, " ");
    return what ? { kind: "phrase", what } : null;
  }

  /** Make the canvas ready; throws where the browser has no WebGL 2. */
  async start() {
    this.nv = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.35, 0.8, 1, 0.75], crosshairWidthUnit: "mm", crosshairGap: 8, showAllOrientationMarkers: true, fontColor: [0.95, 0.91, 0.72, 1], show3Dcrosshair: true, sagittalNoseLeft: true,
      dragAndDropEnabled: false, logLevel: "silent", loadingText: "", multiplanarShowRender: 0, multiplanarPadPixels: 6, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
      isAlphaClipDark: false, isAntiAlias: false,
    });
    this.nv.addColormap("medvl", medvl.COLOURS);
    await this.nv.attachToCanvas(this.canvas);
    this.nv.onLocationChange = (place) => this.moved(place);
    this.nv.onIntensityChange = (volume) => this.app.windowChanged(volume.cal_min, volume.cal_max, this);
  }

  /** Show an image that is there already as a NiiVue volume; panels share it. */
  show(info, volume) {
    const flat = info.kind === "xray";
    const nv = this.nv;
    this.info = info;
    this.found = this.overlay = null;
    nv.overlayTexture = nv.rgbaTex(nv.overlayTexture, nv.gl.TEXTURE2, [3, 2, 2, 2], true); // as NiiVue begins
    Object.assign(nv.opts, { isRadiologicalConvention: !flat, isOrientationTextVisible: !flat, dragMode: flat ? niivue.DRAG_MODE.pan : niivue.DRAG_MODE.windowing });
    nv.volumes = [];
    nv.overlays = [];
    nv.addVolume(volume);
    const ends = flat && info.orientation ? info.orientation : null;
    const opposite = (letters) => [...letters].map((letter) => ({ L: "R", R: "L", A: "P", P: "A", H: "F", F: "H" })[letter] || "").join("");
    const text = ends ? { right: ends[0], left: opposite(ends[0]), bottom: ends[1], top: opposite(ends[1]) } : {};
    for (const [at, span] of Object.entries(this.sides)) span.textContent = text[at] || "";
    this.slices.hidden = flat;
    this.jump.textContent = flat ? "Highest point" : "Strongest slice";
    this.told(null);
    this.fit();
  }

  /** Draw the crosshair or not, some pixels wide on a film and on a slice alike. */
  crosshair(on) {
    const { dimsRAS, pixDimsRAS } = this.nv.volumes[0];
    const tile = Math.min(this.canvas.clientWidth / (this.nv.opts.sliceType === 3 ? 3 : 1), this.canvas.clientHeight);
    const extent = Math.max(dimsRAS[1] * pixDimsRAS[1], dimsRAS[2] * pixDimsRAS[2]);
    this.nv.opts.crosshairWidth = on ? (1.5 * extent) / Math.max(100, tile) : 0;
    this.nv.opts.show3Dcrosshair = on;
    this.nv.drawScene();
  }

  fit() {
    const nv = this.nv;
    nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    nv.volScaleMultiplier = 1;
    nv.scene.crosshairPos = [0.5, 0.5, 0.5];
    this.redraw();
  }

  redraw() {
    this.nv.drawScene();
    this.nv.createOnLocationChange();
  }

  setView(type) {
    this.nv.setSliceType(type);
    this.crosshair(this.app.style().cross);
    this.redraw();
  }

  /** Draw the image anew after its window has changed. */
  windowed() {
    const nv = this.nv;
    if (!nv.volumes.length) return;
    nv.refreshLayers(nv.volumes[0], 0);
    nv.drawScene();
  }

  zoom(factor) {
    const nv = this.nv;
    const [x, y, z, now] = nv.scene.pan2Dxyzmm;
    const next = Math.min(20, Math.max(0.3, now * factor));
    const mm = nv.frac2mm(nv.scene.crosshairPos);
    const change = now - next;
    nv.scene.pan2Dxyzmm = [x + change * mm[0], y + change * mm[1], z + change * mm[2], next]; // the crosshair stays where it is
    if (nv.opts.sliceType === 4) nv.setScale(Math.min(4, Math.max(0.3, nv.scene.volScaleMultiplier * factor)));
    nv.drawScene();
  }

  /** Lay a map over the image, or none. */
  async lay(found) {
    this.told(found);
    const nv = this.nv;
    if (!found || found.min === null) {
      if (this.overlay) this.styled();
      return;
    }
    const buffer = medvl.withoutGaps(await medvl.unpacked(medvl.bytes(found.nifti)));
    const first = !this.overlay;
    this.overlay = await niivue.NVImage.new(buffer, "map.nii", "medvl", 0.5, null, found.min, found.max, true);
    if (this.found !== found) return; // another has come meanwhile
    nv.volumes = [nv.volumes[0], this.overlay];
    nv.overlays = [this.overlay];
    if (first) nv.refreshColormaps();
    this.styled();
  }

  /** Draw the map anew with the opacity and threshold that are set. */
  styled() {
    if (!this.overlay) return;
    const nv = this.nv;
    const { opacity, threshold, on } = this.app.style();
    if (this.found && this.found.min !== null) {
      const span = Math.max(1e-6, this.found.max - this.found.min);
      this.overlay.cal_min = this.found.min + threshold * span;
      this.overlay.cal_max = this.found.max;
      this.low.textContent = (this.found.min + threshold * span).toFixed(2);
      this.high.textContent = this.found.max.toFixed(2);
    }
    this.overlay.opacity = on && this.found ? opacity : 0;
    this.paint();
    nv.drawScene();
  }

  /**
   * Colour the map into a texture about as fine as the map is. NiiVue takes the image's own size, which of a large CT is 300 MB and, on a
   * machine without a graphics card, some seconds for every letter typed.
   */
  paint() {
    const nv = this.nv;
    const { dims } = nv.back;
    const shrink = Math.max(1, Math.cbrt((dims[1] * dims[2] * dims[3]) / medvl.MAP_TEXELS));
    nv.gl.deleteTexture(nv.overlayTexture);
    nv.back.dims = [dims[0], ...dims.slice(1, 4).map((n) => Math.max(1, Math.round(n / shrink)))];
    nv.refreshLayers(this.overlay, 1);
    nv.back.dims = dims;
    for (const shader of [nv.renderShader, nv.pickingImageShader]) {
      shader.use(nv.gl);
      nv.gl.uniform3fv(shader.uniforms.texVox, nv.vox); // the step through the image is still the image's
    }
  }

  /** Say what was found, without drawing. */
  told(found) {
    this.found = found;
    this.legend.hidden = !found || found.min === null;
    this.jump.disabled = !found || !found.peak;
    this.where.textContent = !found ? "" : found.peak ? `Highest at ${found.peak.words}` : "No place stands out: the map is flat, or the model did not look";
    this.drawBar();
    this.describe();
  }

  sliceCount() {
    return this.nv && this.nv.volumes.length ? this.nv.volumes[0].dimsRAS[3] : 1;
  }

  slice() {
    return Math.min(this.sliceCount() - 1, Math.max(0, this.nv.frac2vox(this.nv.scene.crosshairPos)[2]));
  }

  moveTo(mm) {
    this.nv.scene.crosshairPos = this.nv.mm2frac(mm);
    this.redraw();
  }

  toSlice(index) {
    const at = this.nv.scene.crosshairPos;
    this.nv.scene.crosshairPos = [at[0], at[1], (Math.min(this.sliceCount() - 1, Math.max(0, index)) + 0.5) / this.sliceCount()];
    this.redraw();
  }

  /** Where the strongest slice is highest, or the radiograph is. */
  strongest() {
    if (!this.found || !this.found.peak) return null;
    const slices = this.found.slices;
    if (!slices || !slices.values.length) return this.found.peak.mm;
    return slices.points[slices.values.indexOf(Math.max(...slices.values))];
  }

  /** Colour the bar by the score of each slice. */
  drawBar() {
    if (this.slices.hidden || !this.nv || !this.nv.volumes.length) return;
    const box = this.bar.getBoundingClientRect();
    const strip = this.strip;
    strip.width = Math.max(1, Math.round(box.width));
    strip.height = Math.max(1, Math.round(box.height));
    const pen = strip.getContext("2d");
    const slices = this.found && this.found.slices;
    this.slices.title = this.jump.title = slices ? `By the ${slices.of}` : "";
    if (!slices || !slices.values.length) return;
    const places = slices.points.map((mm) => this.nv.mm2frac(mm)[2]);
    const low = Math.min(...slices.values);
    const span = Math.max(1e-6, Math.max(...slices.values) - low);
    const step = places.length > 1 ? Math.abs(places[places.length - 1] - places[0]) / (places.length - 1) : 1;
    slices.values.forEach((value, i) => {
      const part = (value - low) / span;
      const tall = Math.max(2, part * strip.height);
      pen.fillStyle = medvl.colour(part);
      pen.fillRect((places[i] - step / 2) * strip.width, strip.height - tall, step * strip.width + 1, tall);
    });
  }

  moved(place) {
    if (!this.info) return;
    const count = this.sliceCount();
    const slice = this.slice();
    this.mark.style.left = `${(100 * (slice + 0.5)) / count}%`;
    this.bar.setAttribute("aria-valuemax", count);
    this.bar.setAttribute("aria-valuenow", slice + 1);
    this.bar.setAttribute("aria-valuetext", `slice ${slice + 1} of ${count} from below`);
    const value = place && place.values && place.values.length ? place.values[0].value : null;
    this.here.textContent = this.info.kind === "xray" ? "" : `Slice ${slice + 1} of ${count} from below · crosshair ${medvl.directions(this.nv.frac2mm(this.nv.scene.crosshairPos))}${value === null ? "" : ` · ${Math.round(value)} HU`}`;
    this.describe();
    this.app.moved(this);
  }

  describe() {
    if (!this.info) return;
    const view = this.info.kind === "xray" ? "Radiograph" : `CT, ${(medvl.VIEWS.find(([, type]) => this.nv && type === this.nv.opts.sliceType) || ["axial"])[0].toLowerCase()} view. ${this.here.textContent}`;
    this.canvas.setAttribute("aria-label", `${view}${this.query ? `. Map of ${this.query.what.replaceAll("_", " ")}: ${this.where.textContent}` : ""}`);
  }

  wait(text) {
    this.busy.textContent = text || "";
    this.busy.hidden = !text;
  }

  fail(text) {
    this.failure.textContent = text || "";
    this.failure.hidden = !text;
  }
};

/** RAS mm in the words of a radiologist. */
medvl.directions = function (mm) {
  const [x, y, z] = mm;
  return `${x >= 0 ? "R" : "L"} ${Math.abs(x).toFixed(0)} ${y >= 0 ? "A" : "P"} ${Math.abs(y).toFixed(0)} ${z >= 0 ? "S" : "I"} ${Math.abs(z).toFixed(0)} mm`;
};

/** The map's colour at 0 .. 1. */
medvl.colour = function (part) {
  const { R, G, B, I } = medvl.COLOURS;
  const at = Math.min(255, Math.max(1, part * 255));
  let i = 1;
  while (i < I.length - 2 && at > I[i + 1]) i++;
  const share = (at - I[i]) / (I[i + 1] - I[i]);
  return `rgb(${[R, G, B].map((of) => Math.round(of[i] + share * (of[i + 1] - of[i]))).join(" ")})`;
};
