export * from '../convert/hub.js'
