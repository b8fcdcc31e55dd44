/* Browsers start no worker for a page that is read from disk: there an iframe does the search. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((resolve) => frame.addEventListener("load", () => resolve(frame.contentWindow)));
      frame.srcdoc = `<script>
        self.postMessage = (data) => frameElement.worker.dispatchEvent(new MessageEvent("message", { data }));
        self.importScripts = (...urls) => Promise.all(urls.map((url) => new Promise((done) => {
          document.head.append(Object.assign(document.createElement("script"), { src: url, onload: done }));
        })));
      <\/script><script src="${new URL(url, document.baseURI)}"><\/script>`;
      frame.worker = this;
      const add = () => document.body.append(frame);
      document.body ? add() : addEventListener("DOMContentLoaded", add);
    }
    postMessage(data) {
      this.ready.then((frame) => frame.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
